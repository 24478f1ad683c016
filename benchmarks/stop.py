"""From SIGTERM to the exit, by activity; the cost of saving before an evaluation, of checksums, and of HMAC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import processes, sft, trl_ppo, workload
from benchmarks.options import Options
from benchmarks.record import spread

TARGET_S = 5.0
"""Seconds beyond the work in hand that is finished first."""
_FEW_ROWS, _MANY_ROWS = 400, 30_000
"""Many take longer to prepare than Ray takes to start."""
_STEPS = 200
_EVALUATION = {"max_new_tokens": 64, "batch": 8}
_QUESTIONS = 400
_INTO_EVALUATION_S = 3.0
_TRIES = 20
_LOOK_S = 0.02


@dataclass(frozen=True)
class ObservedRun:
    """A run, as seen from outside."""

    pid: int
    """Of the command."""
    folder: Path
    """Of the run."""

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in _rows(self.folder / "events.jsonl") if event["event"] == kind]

    def metrics(self) -> list[dict[str, Any]]:
        return [row for path in self.folder.glob("*/metrics.jsonl") for row in _rows(path)]

    def has_process(self, part: str) -> bool:
        """Whether the command has started one whose command line has this in it."""
        return any(part in command for command in map(_command_of, processes.descendants(self.pid)))


@dataclass(frozen=True)
class Stopped:
    """A run that was asked to stop."""

    seconds: float
    """From the request to the exit of the command."""
    work_s: float
    """What was in hand, which is finished first, the save included; 0 where all ends at once."""
    status: int

    @property
    def over_s(self) -> float:
        return self.seconds - self.work_s


@dataclass(frozen=True)
class Activity:
    """What a run does when it is asked to stop."""

    job: dict[str, Any]
    is_reached: Callable[[ObservedRun, int], bool]
    """Whether the run has come to it, in the round of this number."""
    work_s: Callable[[ObservedRun], float] = lambda run: 0.0
    keeps_cache: bool = True
    """Whether all rounds have the same data cache."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of a run for every activity."""
    work = workload.make(folder / "sft", _FEW_ROWS)
    costs = _costs(work, folder / "costs", folder / "cache", options)
    activities = _activities(work, folder, options, costs.pop("generated_batch_s"))
    stopped: dict[str, list[Stopped]] = {name: [] for name in activities}
    for number in range(options.rounds):
        for name, activity in activities.items():
            own = folder / f"{name.replace(' ', '-')}-{number}"
            cache = folder / "cache" if activity.keeps_cache else own / "cache"
            stopped[name].append(_stop(activity, number, own, cache, options.timeout_s))
            print(f"{name}: {stopped[name][-1]}", file=sys.stderr, flush=True)
    return {
        "stage": options.stage,
        "target_over_s": TARGET_S,
        "activities": {name: summary(times) for name, times in stopped.items()},
        **costs,
    }


def summary(stopped: Sequence[Stopped]) -> dict[str, Any]:
    """`over_s` is the claim."""
    return {
        "seconds": spread([each.seconds for each in stopped], 2),
        "work_s": spread([each.work_s for each in stopped], 2),
        "over_s": spread([each.over_s for each in stopped], 2),
        "statuses": [each.status for each in stopped],
    }


def _activities(work: workload.Workload, folder: Path, options: Options, batch_s: float) -> dict[str, Activity]:
    """`batch_s`: seconds of one batch of generated answers."""
    many = workload.make(folder / "many", _MANY_ROWS)
    roles = trl_ppo.make(folder / "ppo")

    def job(of: workload.Workload, steps: int = _STEPS, batch: int = 16, **settings: Any) -> dict[str, Any]:
        made = sft.job(of, sft.Training(steps=steps, batch=batch, stage=options.stage))
        made["phases"]["sft"] |= settings
        return made

    questions: dict[str, Any] = {"eval": {"data": str(_questions(work)), **_EVALUATION}, "eval_on_start": True}
    return {
        "starting Ray": Activity(job(work), lambda run, _: run.has_process("gcs_server")),
        "preparing data": Activity(job(many), lambda run, _: run.has_process("raylet/raylet"), keeps_cache=False),
        "starting workers": Activity(job(work), lambda run, _: bool(run.events("phase_started"))),
        "loading the model": Activity(job(work), lambda run, _: bool(run.events("workers"))),
        "training": Activity(job(work), lambda run, _: len(run.metrics()) >= 4, _step_and_save),
        "PPO": Activity(
            trl_ppo.job(roles, options.stage, _STEPS, rollout_batch=16, batch=8),
            lambda run, nth: is_into_iteration(run, nth / options.rounds),
            _part_and_save,
        ),
        "evaluating": Activity(job(work, **questions), _evaluates, lambda run: batch_s),
        "exporting": Activity(job(work, steps=1), lambda run, _: bool(run.events("checkpoint"))),
    }  # fmt: skip


def is_into_iteration(run: ObservedRun, share: float) -> bool:
    """Whether that share of the second iteration has gone by, if it is as long as the first."""
    rows = run.metrics()
    return bool(rows) and time.time() - _written_at(run) >= share * rows[-1]["step_s"]


def _written_at(run: ObservedRun) -> float:
    """When the last row of metrics was written."""
    return max(path.stat().st_mtime for path in run.folder.glob("*/metrics.jsonl"))


def _evaluates(run: ObservedRun, _: int) -> bool:
    began = [datetime.fromisoformat(event["time"]).timestamp() for event in run.events("training")]
    return bool(began) and time.time() - began[0] > _INTO_EVALUATION_S


def _step_and_save(run: ObservedRun) -> float:
    longest: float = max(row["step_s"] for row in run.metrics()[1:])
    return longest + _save_s(run)


def _part_and_save(run: ObservedRun) -> float:
    """Of PPO: the longest part of an iteration, which is one call or a few."""
    longest: float = max(row[part] for row in run.metrics() for part in trl_ppo.PARTS)
    return longest + _save_s(run)


def _save_s(run: ObservedRun) -> float:
    saves = run.events("checkpoint")
    return float(saves[-1]["seconds"]) if saves else 0.0


def _stop(activity: Activity, number: int, folder: Path, cache: Path, timeout_s: float) -> Stopped:
    """Start the job, ask it to stop when it has come to the activity, wait for its end. Raises CommandFailed."""
    folder.mkdir()
    (folder / "job.yaml").write_text(json.dumps(activity.job))
    out = folder / "out.txt"
    with out.open("w") as stream:
        process = subprocess.Popen(
            ["muster", "run", "job.yaml"],
            cwd=folder,
            env={**os.environ, **sft.environment(cache)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    run, deadline = ObservedRun(process.pid, folder / "runs/bench"), time.monotonic() + timeout_s
    try:
        while not activity.is_reached(run, number):
            if process.poll() is not None or time.monotonic() > deadline:
                raise processes.CommandFailed(f"{folder.name}: the activity did not come:\n{out.read_text()[-2000:]}")
            time.sleep(_LOOK_S)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout_s)
        return Stopped(time.monotonic() - asked, activity.work_s(run), status)
    except subprocess.TimeoutExpired:
        raise processes.CommandFailed(f"{folder.name}: did not end:\n{out.read_text()[-2000:]}") from None
    finally:
        processes.end(process)


# What safety costs


def _costs(work: workload.Workload, folder: Path, cache: Path, options: Options) -> dict[str, Any]:
    """A whole run that saves before every evaluation, and its files looked at alone."""
    folder.mkdir()
    one_batch = folder / "questions.jsonl"
    one_batch.write_text("".join(_questions(work).read_text().splitlines(keepends=True)[: 2 * _EVALUATION["batch"]]))
    job = sft.job(work, sft.Training(steps=options.steps, stage=options.stage, save_every=2))
    job["phases"]["sft"] |= {"eval": {"data": str(one_batch), **_EVALUATION}, "eval_every": 2}
    (folder / "job.yaml").write_text(json.dumps(job))
    command = ["muster", "run", "job.yaml"]
    processes.run(command, folder=folder, env=sft.environment(cache), timeout_s=options.timeout_s)
    run = ObservedRun(0, folder / "runs/bench")
    rows = run.metrics()
    return {
        "generated_batch_s": median(row["evaluation_s"] for row in rows if "evaluation_s" in row),
        "step_ms": spread([1e3 * row["step_s"] for row in rows if "step_s" in row][1:], 1),
        "evaluation_ms": spread([1e3 * row["evaluation_s"] for row in rows if "evaluation_s" in row], 1),
        "save_before_evaluation_ms": spread([1e3 * event["stall_s"] for event in run.events("checkpoint")], 1),
        "metrics_beside_checkpoint_ms": _note_ms(run.folder / "sft/checkpoints"),
        **_checksums(run.folder / "sft/checkpoints", cache / "muster"),
        "hmac_us": _hmac_us(),
    }


def _note_ms(checkpoints: Path) -> dict[str, float]:
    from training.checkpoint.repository import opened, step_of
    from training.storage import open_storage

    with_fence = opened(open_storage(str(checkpoints)), 2)
    step = step_of(with_fence.folders()[-1])
    noted = [_ms(lambda: with_fence.note(step, {"eval_accuracy": 0.5, "eval_loss": 1.0})) for _ in range(_TRIES)]
    with_fence.close()
    return spread(noted, 2)


def _checksums(checkpoints: Path, cache: Path) -> dict[str, Any]:
    """Of the tokenized data, which are verified once per start, and of a checkpoint, computed while it is written."""
    import xxhash

    from training.data.token_store import TokenStore

    stores = [TokenStore.open(path.parent) for path in sorted(cache.glob("*/meta.json"))]

    def verify() -> None:
        for store in stores:
            store.verify()

    shards = b"".join(path.read_bytes() for path in max(checkpoints.glob("step-*")).glob("*.safetensors"))
    return {
        "tokens_mb": round(sum(path.stat().st_size for store in stores for path in store.folder.iterdir()) / 1e6, 2),
        "tokens_verified_ms": spread([_ms(verify) for _ in range(_TRIES)], 2),
        "checkpoint_mb": round(len(shards) / 1e6, 1),
        "checkpoint_checksum_ms": spread([_ms(lambda: xxhash.xxh3_128(shards).digest()) for _ in range(_TRIES)], 2),
    }


def _hmac_us() -> dict[str, float]:
    """Of a message of 64 bytes from one worker's store to another's: made and checked."""
    from training.process.authenticated_channel import KEY_BYTES, Frames

    sender, receiver = Frames(bytes(KEY_BYTES)), Frames(bytes(KEY_BYTES))
    payload = bytes(64)
    return spread([1e3 * _ms(lambda: receiver.unpack(bytearray(sender.pack(payload)))) for _ in range(1000)], 1)


def _ms(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def _questions(work: workload.Workload) -> Path:
    """Prompts to answer; what is right does not matter here."""
    path = work.rows.with_name("questions.jsonl")
    prompts = [json.loads(line)["prompt"] for line in work.rows.read_text().splitlines()[:_QUESTIONS]]
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines that are there so far."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
