"""Rows to tokens against `datasets.map` in two processes: rows a second, memory;
and how long a step waits for its data."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil

from benchmarks import data_side, sft, workload
from benchmarks.options import Options
from benchmarks.processes import run
from benchmarks.record import ROOT, ratios, spread

SMALL, LARGE = 10_000, 100_000
_LOOK_S = 0.05
_GPU_STEP_S = 0.3
"""A short step on eight GPUs."""
_HAND_STEPS = 20


@dataclass(frozen=True)
class Side:
    """One preparation of a file by one side."""

    rows: int
    cold_s: float
    warm_s: float
    peak_mib: float
    """Of all its processes together, what they share counted once."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of both sides over a small and a large file, then a short training and the hands of some batches."""
    work = workload.make(folder, LARGE)
    files = {count: _first(work.rows, count) for count in (SMALL, LARGE)}
    found: dict[str, dict[int, list[Side]]] = {name: {count: [] for count in files} for name in data_side.SIDES}
    for number in range(options.rounds):
        for count, rows in files.items():
            for name, sides in found.items():
                cache = folder / f"{name}-{count}-{number}"
                sides[count].append(_side(name, work.model, rows, cache, options.timeout_s))
    return {
        **summary(found),
        "same_tokens": _same(folder / f"muster-{LARGE}-0", folder / f"datasets-{LARGE}-0", work.model, files[LARGE]),
        "waiting": {**_waiting(work, options, folder), **_hands(folder / "hands")},
    }


def summary(found: dict[str, dict[int, list[Side]]]) -> dict[str, Any]:
    """From each side's rounds, by number of rows."""
    rates = {name: [side.rows / side.cold_s for side in sides[LARGE]] for name, sides in found.items()}
    return {
        "rows": LARGE,
        "ratio": ratios(rates["muster"], rates["datasets"]),
        **{f"{name}_rows_per_s": spread(values, 0) for name, values in rates.items()},
        **{f"{name}_warm_s": spread([side.warm_s for side in found[name][LARGE]]) for name in found},
        **{f"{name}_peak_mib": spread([side.peak_mib for side in found[name][LARGE]], 0) for name in found},
        **{f"{name}_memory_growth": _growth(sides) for name, sides in found.items()},
    }


def _growth(sides: dict[int, list[Side]]) -> dict[str, float]:
    return ratios([side.peak_mib for side in sides[LARGE]], [side.peak_mib for side in sides[SMALL]])


def _first(rows: Path, count: int) -> Path:
    path = rows.with_name(f"{count}.jsonl")
    with rows.open() as lines, path.open("w") as out:
        out.writelines(line for line, _ in zip(lines, range(count), strict=False))
    return path


def _side(name: str, model: Path, rows: Path, cache: Path, timeout_s: float) -> Side:
    env = {**sft.environment(cache), "PYTHONPATH": str(ROOT)}
    env |= {"TOKENIZERS_PARALLELISM": "true" if name == "muster" else "false"}
    command = [sys.executable, "-m", "benchmarks.data_side", name, *map(str, (model, rows, cache))]
    with _Peak() as peak:
        finished = run(command, folder=rows.parent, env=env, timeout_s=timeout_s)
    (figures,) = (json.loads(line.text) for line in finished.lines if line.text.startswith('{"rows":'))
    return Side(**figures, peak_mib=peak.mib)


class _Peak:
    """The most memory that the processes below this one take together while a block runs."""

    mib = 0.0

    def __enter__(self) -> _Peak:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            self.mib = max(self.mib, sum(map(_mib, psutil.Process().children(recursive=True))))


def _mib(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return float(process.memory_full_info().pss / (1 << 20))
    return 0.0


def _same(ours: Path, theirs: Path, model: Path, rows: Path) -> bool:
    """Whether both sides gave every row the same tokens and the same mask. Ours are found in the cache."""
    store, dataset = data_side.with_muster(model, rows, ours), data_side.with_datasets(model, rows, theirs)
    return len(store) == len(dataset) and all(
        ids.tolist() == row["input_ids"] and is_target.tolist() == [label >= 0 for label in row["labels"]]
        for (ids, is_target), row in zip(store, dataset, strict=True)
    )


def _waiting(work: workload.Workload, options: Options, folder: Path) -> dict[str, Any]:
    """A training of the 15.5 million parameter model, as its metrics tell."""
    training = sft.Training(steps=2 + options.steps, stage=options.stage, timeout_s=options.timeout_s)
    sft.muster(work, training, folder / "run", folder / "cache")
    lines = (folder / "run/runs/bench/sft/metrics.jsonl").read_text().splitlines()[2:]
    steps = [json.loads(line) for line in lines]
    return {
        "wait_share": spread([step["data_s"] / step["step_s"] for step in steps], 5),
        "data_ms": spread([1000 * step["data_s"] for step in steps], 2),
    }


def _hands(folder: Path) -> dict[str, Any]:
    """Milliseconds in which one of eight workers has its part of a batch in hand,
    and what share of a short step that is."""
    chance = random.Random(17)
    of_rows = (workload.GSM8K.prompt, workload.GSM8K.completion)
    gsm8k = [sum(length.draw(chance.gauss(0, 1)) for length in of_rows) for _ in range(1 << 14)]
    times = {
        "64_rows_of_2048_tokens": _hand_s([2048] * 4096, 64, folder / "long"),
        "512_rows_of_gsm8k": _hand_s(gsm8k, 512, folder / "gsm8k"),
    }
    return {
        name: {"hand_ms": spread([1000 * time for time in each], 2), "share": round(median(each) / _GPU_STEP_S, 4)}
        for name, each in times.items()
    }


def _hand_s(lengths: Sequence[int], batch: int, folder: Path) -> list[float]:
    """What `Trainer` does before its engine begins."""
    import numpy as np

    from training.data.batching import BatchLimits, partition_batch
    from training.data.collate import collate
    from training.data.order import Order
    from training.data.token_store import TokenStore, create

    with create(folder, sources=1) as writer:
        for number, length in enumerate(lengths, start=1):
            places = np.arange(length)
            writer.add(places, places > length // 3, source=0, part="rows", number=number)
    store, times = TokenStore.open(folder), []
    order, limits = Order(store.source_sizes, seed=17), BatchLimits(micro_tokens=4096, row_tokens=4096, one_row=True)
    for step in range(_HAND_STEPS):
        began = perf_counter()
        samples = order.samples(step * batch, (step + 1) * batch)
        mine = partition_batch(store.lengths_of(samples).tolist(), 8, limits)[0]
        for rows in mine:
            collate([[store[int(samples[place])] for place in row] for row in rows])
        times.append(perf_counter() - began)
    return times[1:]
