"""Steady-state step time of Muster against the hand-written loop under torchrun and DeepSpeed,
and whether they learn alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import sft, workload
from benchmarks.options import Options
from benchmarks.record import largest_difference, ratios, spread

WARM_UP = 3
"""Steps at the start of a run that are not counted."""
ROWS = 2000
TARGET = 1.05
LAYOUTS = ("dealt", "padded")


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of: Muster, the loop with Muster's layout of the batch, the loop with a layout as written by hand."""
    work = workload.make(folder, ROWS)
    training = sft.Training(steps=WARM_UP + options.steps, stage=options.stage, timeout_s=options.timeout_s)
    cache = folder / "cache"
    ours: list[sft.Curve] = []
    theirs: dict[str, list[sft.Curve]] = {layout: [] for layout in LAYOUTS}
    for number in range(options.rounds):
        ours.append(sft.muster(work, training, folder / f"muster-{number}", cache).curve)
        for layout in LAYOUTS:
            theirs[layout].append(sft.plain_loop(work, training, layout, cache))
    return {"stage": options.stage, "steps": options.steps, "target": TARGET, **summary(ours, theirs)}


def summary(ours: Sequence[sft.Curve], theirs: dict[str, list[sft.Curve]]) -> dict[str, Any]:
    """`ratio` is the claim: median step, the batch laid out alike.
    `wall_ratio` has what happens between steps as well."""
    own = [steady_step_s(curve) for curve in ours]
    figures: dict[str, Any] = {
        "ratio": ratios(own, [steady_step_s(curve) for curve in theirs["dealt"]]),
        "wall_ratio": ratios([c.wall_step_s for c in ours], [c.wall_step_s for c in theirs["dealt"]]),
        "ratio_to_padded": ratios(own, [steady_step_s(curve) for curve in theirs["padded"]]),
        "muster_step_s": spread(own),
    }
    for layout, curves in theirs.items():
        figures[f"{layout}_step_s"] = spread([steady_step_s(curve) for curve in curves])
        figures[f"{layout}_loss_difference"] = largest_difference(ours[0].losses, curves[0].losses)
    return figures


def steady_step_s(curve: sft.Curve) -> float:
    """Median of the steps, as the side measures them, without the first ones."""
    return median(curve.step_s[WARM_UP:])
