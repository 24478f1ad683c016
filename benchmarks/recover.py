"""From the SIGKILL of a worker to the next finished step, against the start of the same job in the same run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import sft, workload
from benchmarks.options import Options
from benchmarks.processes import Line
from benchmarks.record import ratios, spread

ROWS = 2000
SAVE_EVERY = 4
STEPS = 12
KILLED_AT = 6
"""The step whose line tells that it is time."""
TARGETS = {"ratio": 1.0, "noticed_s": 2.0}


class Recovered(NamedTuple):
    """Seconds."""

    start_s: float
    """From the command to the end of the first step."""
    noticed_s: float
    """From the kill to the entry of the incident."""
    recover_s: float
    """From the kill to the end of the first step of the next attempt."""
    steps_lost: int


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of: a run, one of whose workers is killed."""
    work = workload.make(folder, ROWS)
    training = sft.Training(steps=STEPS, stage=options.stage, save_every=SAVE_EVERY, timeout_s=options.timeout_s)
    cache = folder / "cache"
    sft.muster(work, training, folder / "warm-up", cache)  # the data are tokenized once, for every start
    runs = [_killed(work, training, folder / f"run-{number}", cache) for number in range(options.rounds)]
    return {"stage": options.stage, "targets": TARGETS, **summary(runs)}


def summary(runs: Sequence[Recovered]) -> dict[str, Any]:
    """`ratio` is the claim."""
    return {
        "ratio": ratios([run.recover_s for run in runs], [run.start_s for run in runs]),
        "start_s": spread([run.start_s for run in runs]),
        "recover_s": spread([run.recover_s for run in runs]),
        "noticed_s": spread([run.noticed_s for run in runs]),
        "steps_lost": [run.steps_lost for run in runs],
    }


def _killed(work: workload.Workload, training: sft.Training, folder: Path, cache: Path) -> Recovered:
    killed_at: list[tuple[float, float]] = []

    def kill(line: Line) -> None:
        if not killed_at and line.text.startswith(f"sft  step {KILLED_AT:>6}/"):
            workers = next(e for e in sft.events(folder) if e["event"] == "workers")["workers"]
            os.kill(workers[-1]["pid"], signal.SIGKILL)
            killed_at.append((line.at, time.time()))

    run = sft.muster(work, training, folder, cache, on_line=kill)
    (at, clock), (incident,) = killed_at[0], [e for e in run.events if e["event"] == "incident"]
    told = next(line.at for line in run.finished.lines if line.text.startswith("sft: killed"))
    steps = [line.at for line in run.finished.lines if line.text.startswith("sft  step")]
    return Recovered(
        start_s=steps[0],
        noticed_s=datetime.fromisoformat(incident["time"]).timestamp() - clock,
        recover_s=next(step for step in steps if step > told) - at,
        steps_lost=incident["step"] - 1 - incident["checkpoint"],
    )
