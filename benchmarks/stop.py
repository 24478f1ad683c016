"""From SIGTERM to the exit, by what the run is doing; and what saving before an evaluation, checksums and tags cost beside a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
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
_FEW_ROWS, _MANY_ROWS = 400, 60_000
"""Many take longer to prepare than Ray takes to start."""
_STEPS = 200
_EVALUATION = {"max_new_tokens": 64, "batch": 8}
_QUESTIONS = 400
_INTO_EVALUATION_S = 3.0
_TRIES = 20
_LOOK_S = 0.02


@dataclass(frozen=True)
class Seen:
    """What can be seen of a run from outside."""

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
class Moment:
    """What a run is doing when it is asked to stop."""

    job: dict[str, Any]
    is_reached: Callable[[Seen, int], bool]
    """Whether it is time, in which round."""
    work_s: Callable[[Seen], float] = lambda seen: 0.0
    keeps_cache: bool = True
    """Whether all rounds have the same data cache."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of a run for every moment."""
    work = workload.make(folder / "sft", _FEW_ROWS)
    many = workload.make(folder / "many", _MANY_ROWS)
    large = workload.make(folder / "large", _FEW_ROWS, shape=workload.LARGE)
    roles = trl_ppo.make(folder / "ppo")
    costs = _costs(work, folder / "costs", folder / "cache", options)
    moments = _moments(work, many, large, roles, options, costs.pop("generated_batch_s"))
    stopped: dict[str, list[Stopped]] = {name: [] for name in moments}
    for number in range(options.rounds):
        for name, moment in moments.items():
            own = folder / f"{name.replace(' ', '-')}-{number}"
            cache = folder / "cache" if moment.keeps_cache else own / "cache"
            stopped[name].append(_stop(moment, number, own, cache, options.timeout_s))
    return {
        "stage": options.stage,
        "target_over_s": TARGET_S,
        "moments": {name: summary(of_moment) for name, of_moment in stopped.items()},
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


def _moments(
    work: workload.Workload,
    many: workload.Workload,
    large: workload.Workload,
    roles: trl_ppo.Roles,
    options: Options,
    batch_s: float,
) -> dict[str, Moment]:
    def job(of: workload.Workload, steps: int = _STEPS, batch: int = 16, **settings: Any) -> dict[str, Any]:
        made = sft.job(of, sft.Training(steps=steps, batch=batch, stage=options.stage))
        made["phases"]["sft"] |= settings
        return made

    questions: dict[str, Any] = {"eval": {"data": str(_questions(work)), **_EVALUATION}, "eval_on_start": True}
    exporting = job(large, steps=1, batch=2)
    return {
        "starting Ray": Moment(job(work), lambda seen, _: seen.has_process("gcs_server")),
        "preparing data": Moment(job(many), lambda seen, _: seen.has_process("raylet/raylet"), keeps_cache=False),
        "starting workers": Moment(job(work), lambda seen, _: bool(seen.events("phase_started"))),
        "loading the model": Moment(job(work), lambda seen, _: bool(seen.events("workers"))),
        "training": Moment(job(work), lambda seen, _: len(seen.metrics()) >= 4, _step_and_save),
        "PPO": Moment(
            trl_ppo.job(roles, options.stage, _STEPS), lambda seen, nth: is_into_iteration(seen, nth / options.rounds), _part_and_save
        ),
        "evaluating": Moment(job(work, **questions), _evaluates, lambda seen: batch_s),
        "exporting": Moment(exporting, lambda seen, _: bool(seen.events("checkpoint"))),
    }  # fmt: skip


def is_into_iteration(seen: Seen, share: float) -> bool:
    """Whether that share of the third iteration has gone by, if it is as long as the second."""
    rows = seen.metrics()
    return len(rows) >= 2 and time.time() - _written_at(seen) >= share * rows[1]["step_s"]


def _written_at(seen: Seen) -> float:
    """When the last row of metrics was written."""
    return max(path.stat().st_mtime for path in seen.folder.glob("*/metrics.jsonl"))


def _evaluates(seen: Seen, _: int) -> bool:
    began = [datetime.fromisoformat(event["time"]).timestamp() for event in seen.events("training")]
    return bool(began) and time.time() - began[0] > _INTO_EVALUATION_S


def _step_and_save(seen: Seen) -> float:
    return max(row["step_s"] for row in seen.metrics()[1:]) + _save_s(seen)


def _part_and_save(seen: Seen) -> float:
    """Of PPO: the longest part of an iteration, which is one call or a few."""
    return max(row[part] for row in seen.metrics()[1:] for part in trl_ppo.PARTS) + _save_s(seen)


def _save_s(seen: Seen) -> float:
    return seen.events("checkpoint")[-1]["seconds"]


def _stop(moment: Moment, number: int, folder: Path, cache: Path, timeout_s: float) -> Stopped:
    """Start the job, ask it to stop when the moment has come, wait for its end. Raises CommandFailed."""
    folder.mkdir()
    (folder / "job.yaml").write_text(json.dumps(moment.job))
    out = folder / "out.txt"
    with out.open("w") as stream:
        process = subprocess.Popen(
            ["muster", "run", "job.yaml"],
            cwd=folder,
            env={**os.environ, **sft.environment(cache)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen, deadline = Seen(process.pid, folder / "runs/bench"), time.monotonic() + timeout_s
    try:
        while not moment.is_reached(seen, number):
            if process.poll() is not None or time.monotonic() > deadline:
                raise processes.CommandFailed(f"{folder.name}: the moment did not come:\n{out.read_text()[-2000:]}")
            time.sleep(_LOOK_S)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout_s)
        return Stopped(time.monotonic() - asked, moment.work_s(seen), status)
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
    seen = Seen(0, folder / "runs/bench")
    rows = seen.metrics()
    return {
        "generated_batch_s": median(row["evaluation_s"] for row in rows if "evaluation_s" in row),
        "step_ms": spread([1e3 * row["step_s"] for row in rows if "step_s" in row][1:], 1),
        "evaluation_ms": spread([1e3 * row["evaluation_s"] for row in rows if "evaluation_s" in row], 1),
        "save_before_evaluation_ms": spread([1e3 * event["stall_s"] for event in seen.events("checkpoint")], 1),
        "metrics_beside_checkpoint_ms": _note_ms(seen.folder / "sft/checkpoints"),
        **_checksums(seen.folder / "sft/checkpoints", cache / "muster"),
        "hmac_us": _hmac_us(),
    }


def _note_ms(checkpoints: Path) -> dict[str, float]:
    from training.checkpoints import opened, step_of
    from training.storage import place

    with_fence = opened(place(str(checkpoints)), 2)
    step = step_of(with_fence.folders()[-1])
    noted = [_ms(lambda: with_fence.note(step, {"eval_accuracy": 0.5, "eval_loss": 1.0})) for _ in range(_TRIES)]
    with_fence.close()
    return spread(noted, 2)


def _checksums(checkpoints: Path, cache: Path) -> dict[str, Any]:
    """Of the tokenized data, which are verified once a start; and of a checkpoint, whose writers compute them on the way."""
    import xxhash

    from training.data.store import TokenStore

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
    from training.authenticated_channel import KEY_BYTES, Frames

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
