"""Time from the command to the end of the first step: Muster against the hand-written loop,
and where Muster's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import sft, workload
from benchmarks.options import Options
from benchmarks.record import ratios, spread

ROWS = 7500
"""As many as GSM8K has."""
TARGET = 1.3
STEPS = 2
_LEAN = {"TORCHDYNAMO_DISABLE": "1"}
"""Muster sets it: DeepSpeed then does not import torch's inductor. The loop as people write it does not know."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of: Muster with the tokens of an earlier run, the loop, Muster without, the loop with Muster's trick."""
    work = workload.make(folder, ROWS)
    training = sft.Training(steps=STEPS, stage=options.stage, timeout_s=options.timeout_s)
    warm: list[sft.MusterRun] = []
    cold: list[sft.MusterRun] = []
    loop: list[sft.Curve] = []
    lean: list[sft.Curve] = []
    for number in range(options.rounds):
        cache = folder / f"cache-{number}"
        cold.append(sft.muster(work, training, folder / f"cold-{number}", cache))
        loop.append(sft.plain_loop(work, training, "padded", cache))
        warm.append(sft.muster(work, training, folder / f"warm-{number}", cache))
        lean.append(sft.plain_loop(work, training, "padded", cache, extra=_LEAN))
    return {"stage": options.stage, "target": TARGET, **summary(warm, cold, loop, lean)}


def summary(
    warm: Sequence[sft.MusterRun], cold: Sequence[sft.MusterRun], loop: Sequence[sft.Curve], lean: Sequence[sft.Curve]
) -> dict[str, Any]:
    """`ratio` is the claim: data tokenized before, against the loop as it is commonly written."""
    seconds = {
        "warm": [run.curve.first_step_s for run in warm],
        "cold": [run.curve.first_step_s for run in cold],
        "loop": [curve.first_step_s for curve in loop],
        "lean_loop": [curve.first_step_s for curve in lean],
    }
    return {
        "ratio": ratios(seconds["warm"], seconds["loop"]),
        "cold_ratio": ratios(seconds["cold"], seconds["loop"]),
        "ratio_to_lean": ratios(seconds["warm"], seconds["lean_loop"]),
        **{f"{side}_s": spread(values, 2) for side, values in seconds.items()},
        "warm_parts_s": _parts_of(warm),
        "cold_parts_s": _parts_of(cold),
    }


def _parts_of(runs: Sequence[sft.MusterRun]) -> dict[str, dict[str, float]]:
    each = [parts(run) for run in runs]
    return {name: spread([one[name] for one in each], 2) for name in each[0]}


def parts(run: sft.MusterRun) -> dict[str, float]:
    """Seconds from the command to the first step, cut at the events that the run wrote down."""
    came = {event["event"]: datetime.fromisoformat(event["time"]).timestamp() for event in run.events}
    ends = {
        "command line, data, Ray": came["started"] - run.finished.began,
        "workers, imports, model, engine": came["training"] - run.finished.began,
        "first step": run.curve.first_step_s,
    }
    lengths: dict[str, float] = {}
    for name, end in ends.items():
        lengths[name] = end - sum(lengths.values())
    return lengths
