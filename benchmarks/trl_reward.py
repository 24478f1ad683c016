"""Pairs/s of Muster's reward model against TRL's RewardTrainer under accelerate
with DeepSpeed ZeRO, two processes each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import environments, peers, sft, workload
from benchmarks.options import Options
from benchmarks.record import ratios, spread

ROWS = 1000
TARGET = 1.2
LAYOUT = peers.Layout(1, 8)
"""The fastest of 8, 4, 2 and 1 pairs in a micro-batch."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of Muster and TRL."""
    python = environments.python_of(environments.TRL, folder)
    work = peers.apart(workload.make_pairs, folder, ROWS)
    training = sft.Training(
        steps=1 + options.steps, stage=options.stage, recipe="reward", watch_memory=True, timeout_s=options.timeout_s
    )
    ours, theirs = [], []
    for number in range(options.rounds):
        ours.append(sft.muster(work, training, folder / f"muster-{number}", folder / "cache").curve)
        theirs.append(peers.train("trl", work, training, LAYOUT, python))
    rates = [[_pairs_per_s(curve, training.batch) for curve in side] for side in (ours, theirs)]
    return {
        "stage": options.stage,
        "steps": options.steps,
        "peer": environments.TRL.packages,
        "target": TARGET,
        "ratio": ratios(*rates),
        "muster_pairs_per_s": spread(rates[0], 2),
        "trl_pairs_per_s": spread(rates[1], 2),
        "memory_ratio": ratios([curve.peak_gib for curve in ours], [curve.peak_gib for curve in theirs]),
        "muster_peak_gib": spread([curve.peak_gib for curve in ours], 2),
        "trl_peak_gib": spread([curve.peak_gib for curve in theirs], 2),
        "muster_last_loss": ours[0].losses[-1],
        "trl_last_loss": theirs[0].losses[-1],
    }


def _pairs_per_s(curve: sft.Curve, batch: int) -> float:
    """From outside, without the first step."""
    return batch * (len(curve.losses) - 1) / curve.rest_s
