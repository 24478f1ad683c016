"""What LoRA costs and spares: step time and peak memory of a worker against training all weights,
the same rows and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import sft, workload
from benchmarks.options import Options
from benchmarks.record import ratios, spread
from benchmarks.step import WARM_UP, steady_step_s

ROWS = 400
BATCH = 4
RANK = 16


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of both, on a model of 98 million parameters."""
    work = workload.make(folder, ROWS, shape=workload.LARGE)
    sides: dict[str, list[sft.Curve]] = {"full": [], "lora": []}
    for number in range(options.rounds):
        for name, curves in sides.items():
            training = sft.Training(
                steps=WARM_UP + options.steps,
                batch=BATCH,
                stage=options.stage,
                lora={"rank": RANK, "alpha": 2 * RANK} if name == "lora" else None,
                timeout_s=options.timeout_s,
            )
            curves.append(sft.muster(work, training, folder / f"{name}-{number}", folder / "cache").curve)
    times = {name: [steady_step_s(curve) for curve in curves] for name, curves in sides.items()}
    memory = {name: [curve.memory_gib for curve in curves] for name, curves in sides.items()}
    return {
        "stage": options.stage,
        "steps": options.steps,
        "rank": RANK,
        "step_ratio": ratios(times["lora"], times["full"]),
        "memory_ratio": ratios(memory["lora"], memory["full"]),
        **{f"{name}_step_s": spread(values) for name, values in times.items()},
        **{f"{name}_memory_gib": spread(values, 2) for name, values in memory.items()},
    }
