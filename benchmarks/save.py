"""Checkpoints against DeepSpeed's own: how long training waits, how long a restart waits, how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import sft, workload
from benchmarks.options import Options
from benchmarks.record import ratios, spread

ROWS = 300
BATCH = 4
EVERY = 20
STEPS = 2 * EVERY + 1
"""The last step comes after the second save, so that both lie within the time that is measured."""
OTHER_SIZES = (1, 3)
BYTES_PER_PARAMETER = 12
"""Weight and two moments in fp32: less does not resume exactly."""
TARGETS = {"stall": 0.1, "restore": 1.2, "restore_other_sizes": 2.0, "size": 1.1, "step": 1.05}

Events = list[dict[str, Any]]


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of: Muster without saves, Muster saving, the loop saving, the loop loading,
    Muster restoring on 2, 1, 3 workers."""
    work = workload.make(folder, ROWS, shape=workload.LARGE)
    cache = folder / "cache"
    never = sft.Training(steps=STEPS, batch=BATCH, stage=options.stage, timeout_s=options.timeout_s)
    saving = sft.Training(steps=STEPS, batch=BATCH, stage=options.stage, save_every=EVERY, timeout_s=options.timeout_s)
    loop = sft.Training(steps=2, batch=BATCH, stage=options.stage, save_every=1, timeout_s=options.timeout_s)
    without: list[sft.MusterRun] = []
    with_saves: list[sft.MusterRun] = []
    restored: dict[int, list[Events]] = {workers: [] for workers in (sft.WORKERS, *OTHER_SIZES)}
    peers: list[dict[str, float]] = []
    for number in range(options.rounds):
        without.append(sft.muster(work, never, folder / f"never-{number}", cache))
        here, there = folder / f"saving-{number}", folder / f"loop-{number}"
        with_saves.append(sft.muster(work, saving, here, cache))
        saved = sft.plain_loop_checkpoints(work, loop, there, cache)
        loaded = sft.plain_loop_checkpoints(work, loop, there, cache)
        peers.append({"save_s": median(row["save_s"] for row in saved), "load_s": loaded[0]["load_s"]})
        for workers in restored:
            restored[workers].append(sft.muster_from(2 * EVERY, saving, here, cache, workers))
    newest = sorted((folder / "saving-0/runs/bench/sft/checkpoints").glob("step-*"))[-1]
    sizes = [file.stat().st_size for file in newest.iterdir()]
    return {
        "stage": options.stage,
        "targets": TARGETS,
        "bytes": sum(sizes),
        **summary(without, with_saves, peers, restored, sum(sizes), _num_parameters(with_saves[0].events)),
    }


def summary(
    without: Sequence[sft.MusterRun],
    with_saves: Sequence[sft.MusterRun],
    peers: Sequence[dict[str, float]],
    restored: dict[int, list[Events]],
    size: int,
    num_parameters: int,
) -> dict[str, Any]:
    """All ratios are Muster's to the other's, of the same round."""
    stalls = [median(event["stall_s"] for event in named(run.events, "checkpoint")[:2]) for run in with_saves]
    seconds = {
        workers: [named(events, "restored")[0]["seconds"] for events in runs] for workers, runs in restored.items()
    }
    loads = [peer["load_s"] for peer in peers]
    return {
        "stall_ratio": ratios(stalls, [peer["save_s"] for peer in peers]),
        "restore_ratio": ratios(seconds[sft.WORKERS], loads),
        **{f"restore_{workers}_workers_ratio": ratios(seconds[workers], loads) for workers in OTHER_SIZES},
        "size_ratio": round(size / (BYTES_PER_PARAMETER * num_parameters), 5),
        "step_ratio": ratios([run.curve.wall_step_s for run in with_saves], [run.curve.wall_step_s for run in without]),
        "stall_s": spread(stalls),
        "deepspeed_save_s": spread([peer["save_s"] for peer in peers]),
        "restore_s": spread(seconds[sft.WORKERS]),
        "deepspeed_load_s": spread(loads),
    }


def named(events: Events, name: str) -> Events:
    """The events of one name."""
    return [event for event in events if event["event"] == name]


def _num_parameters(events: Events) -> int:
    return int(named(events, "training")[0]["parameters"])
