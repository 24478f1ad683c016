"""The same training, done by Muster and by the hand-written loop (SFT alone): commands, and what came of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Finished, Line, run
from benchmarks.record import ROOT
from benchmarks.workload import Workload

RATE = 1e-3
WORKERS = 2
_RATE_OF_CHANGE = {"name": "constant", "warmup": 0}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What both sides do, on two workers with one thread each, in fp32."""

    steps: int
    batch: int = 16
    stage: int = 2
    pack: bool = True
    recipe: str = "sft"
    lora: dict[str, int] | None = None
    save_every: int | None = None
    """Steps. None: never but at the end."""
    watch_memory: bool = False
    timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run. Index i is step i + 1."""

    losses: list[float]
    step_s: list[float]
    """As the side itself measures its steps; empty if it does not."""
    tokens: list[int]
    """Non-padding tokens of each step."""
    memory_gib: float = 0.0
    """The most that a worker had resident; 0 where the side does not say."""
    peak_gib: float = 0.0
    """The most that all its processes had together, as seen from outside; 0 if nobody looked."""
    first_step_s: float
    """From the command to the end of the first step."""
    rest_s: float
    """From the end of the first step to the end of the last, all that happens between steps included."""

    @property
    def wall_step_s(self) -> float:
        """Seconds a step, from outside, without the first."""
        return self.rest_s / (len(self.losses) - 1)

    @property
    def tokens_per_s(self) -> float:
        """From outside, without the first step."""
        return sum(self.tokens[1:]) / self.rest_s


def curve(rows: Sequence[dict[str, Any]], ends: Sequence[float], peak_gib: float = 0.0) -> Curve:
    """A run from its rows of metrics, the times at which its first and its last step had ended, and its memory."""
    return Curve(
        losses=[row["loss"] for row in rows],
        step_s=[row["step_s"] for row in rows if "step_s" in row],
        tokens=[row["tokens"] for row in rows],
        memory_gib=max((row["memory_gib"] for row in rows if "memory_gib" in row), default=0.0),
        peak_gib=peak_gib,
        first_step_s=ends[0],
        rest_s=ends[-1] - ends[0],
    )


def environment(cache: Path) -> dict[str, str]:
    """For all sides: one thread a worker, no network, caches of their own, no cluster but one on this machine."""
    return {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "MUSTER_CACHE": str(cache / "muster"),
        "TORCH_EXTENSIONS_DIR": str(cache / "torch_extensions"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


# Muster


@dataclass(frozen=True, kw_only=True)
class MusterRun:
    """A run of Muster and what it wrote down."""

    curve: Curve
    finished: Finished
    events: list[dict[str, Any]]


def muster(
    work: Workload,
    training: Training,
    folder: Path,
    cache: Path,
    on_line: Callable[[Line], None] = lambda line: None,
) -> MusterRun:
    """`muster run` in the new folder `folder`. `on_line` sees each line of its output
    as it comes. Raises CommandFailed."""
    folder.mkdir()
    file = folder / "job.yaml"
    file.write_text(json.dumps(job(work, training)))
    finished = run(
        ["muster", "run", str(file)],
        folder=folder,
        env=environment(cache),
        timeout_s=training.timeout_s,
        on_line=on_line,
        watch_memory=training.watch_memory,
    )
    rows = _json_rows((folder / f"runs/bench/{training.recipe}/metrics.jsonl").read_text().splitlines())
    # The first call to the workers is one step long; its line and the last step's come when the call has ended.
    ends = [line.at for line in finished.lines if line.text.startswith(f"{training.recipe}  step")]
    return MusterRun(curve=curve(rows, ends, finished.peak_gib), finished=finished, events=events(folder))


def muster_from(step: int, training: Training, folder: Path, cache: Path, workers: int) -> list[dict[str, Any]]:
    """The end of the run in `folder` once more, from a step, on so many workers: what was written
    down. Raises CommandFailed."""
    before = len(events(folder))
    command = ["muster", "resume", "bench", "--step", str(step), f"resources.workers={workers}"]
    run(command, folder=folder, env=environment(cache), timeout_s=training.timeout_s)
    return events(folder)[before:]


def events(folder: Path) -> list[dict[str, Any]]:
    """What the run in a folder has written down so far."""
    return _json_rows((folder / "runs/bench/events.jsonl").read_text().splitlines())


def job(work: Workload, training: Training) -> dict[str, Any]:
    """The job of Muster."""
    data = {
        "train": str(work.rows),
        "template": "none",
        "max_length": work.max_tokens,
        "shuffle": False,
        "pack": training.pack,
    }
    phase = {
        "data": data,
        "max_steps": training.steps,
        "batch": training.batch,
        "learning_rate": RATE,
        "schedule": _RATE_OF_CHANGE,
        "optimizer": {"betas": [0.9, 0.999], "weight_decay": 0.0},
        "clip": 1.0,
        "checkpoint": {"every": training.save_every or 1_000_000},
    }
    return {
        "name": "bench",
        "model": {"path": str(work.model), "dtype": "fp32", "lora": training.lora},
        "resources": {"workers": WORKERS, "threads": 1, "gpus_per_worker": 0},
        "sharding": {"stage": training.stage},
        "phases": {training.recipe: phase},
    }


# The hand-written loop


def plain_loop(
    work: Workload,
    training: Training,
    layout: str,
    cache: Path,
    settings: Sequence[str] = (),
    extra: dict[str, str] | None = None,
) -> Curve:
    """benchmarks/plain_loop.py under torchrun. Raises CommandFailed."""
    return printed_curve(_plain_loop(work, training, layout, cache, settings, extra))


def plain_loop_checkpoints(work: Workload, training: Training, folder: Path, cache: Path) -> list[dict[str, float]]:
    """What the loop prints of its checkpoints in `folder`: loading, if there is one,
    and each save. Raises CommandFailed."""
    finished = _plain_loop(work, training, "dealt", cache, settings=["--checkpoints", str(folder)])
    return _json_rows([line.text for line in finished.lines if line.text.startswith(('{"load_s":', '{"save_s":'))])


def _plain_loop(
    work: Workload,
    training: Training,
    layout: str,
    cache: Path,
    settings: Sequence[str] = (),
    extra: dict[str, str] | None = None,
) -> Finished:
    script = [str(ROOT / "benchmarks" / "plain_loop.py"), str(work.model), str(work.rows), "--layout", layout]
    numbers = {
        "--steps": training.steps,
        "--batch": training.batch,
        "--stage": training.stage,
        "--rate": RATE,
        "--max-length": work.max_tokens,
    }
    if training.save_every:
        numbers["--save-every"] = training.save_every
    words = [str(word) for pair in numbers.items() for word in pair] + ([] if training.pack else ["--no-pack"])
    return run(
        ["torchrun", "--standalone", "--nproc-per-node", str(WORKERS), *script, *words, *settings],
        folder=work.model.parent,
        env={**environment(cache), **(extra or {})},
        timeout_s=training.timeout_s,
        watch_memory=training.watch_memory,
    )


def printed_curve(finished: Finished) -> Curve:
    """The run of a side that prints one JSON object a step, at the end of the step, between other lines."""
    steps = [line for line in finished.lines if line.text.startswith('{"step":')]
    return curve(_json_rows([line.text for line in steps]), [line.at for line in steps], finished.peak_gib)


def _json_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]
