"""Runs of the real command that tests disturb, and the one that nobody disturbed to compare them with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

COMMAND = [sys.executable, "-m", "launcher"]
LIMIT_S = 300
STEPS = 120
_JOB = """
model: {{path: {tiny}/model, dtype: fp32}}
resources: {{workers: 2, threads: 1, gpus_per_worker: 0}}
sharding: {{stage: 2}}
seed: 3
storage: {folder}/runs
phases:
  sft:
    data: {{train: {tiny}/train.jsonl, eval: {tiny}/eval.jsonl}}
    batch: 96
    max_steps: {steps}
    learning_rate: 3e-3
    eval_every: 60
    checkpoint: {{every: 20}}
"""


def cache_in(folder: Path) -> Path:
    """A cache of its own, except for what is known of models: to examine one takes seconds, in every run anew."""
    cache, known = folder / "cache", Path(os.environ["MUSTER_CACHE"]) / "models"
    for needed in (cache, known):
        needed.mkdir(parents=True, exist_ok=True)
    if not (cache / "models").exists():
        (cache / "models").symlink_to(known)
    return cache


class Result(NamedTuple):
    """What a run comes to."""

    losses: list[float]
    weights: bytes


class Run:
    """`muster run` of a job on two workers that takes some seconds, in a folder of its own."""

    settings: tuple[str, ...] = ()

    def __init__(self, tiny: Path, folder: Path):
        self.folder, self.log = folder, folder / "out.txt"
        (folder / "job.yaml").write_text(_JOB.format(tiny=tiny, folder=folder, steps=STEPS))

    def start(self, *settings: str, verb: str = "run") -> None:
        what = str(self.folder / "job.yaml") if verb == "run" else str(self.folder / "runs/job")
        self.process = self.popen([*COMMAND, verb, what, *settings])

    def popen(self, command: list[str]) -> subprocess.Popen:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )

    @property
    def environment(self) -> dict[str, str]:
        return {"MUSTER_CACHE": str(cache_in(self.folder))}

    def read(self, file: str) -> bytes:
        """A file of the run, empty if it is not there."""
        path = self.folder / "runs/job" / file
        return path.read_bytes() if path.exists() else b""

    def rows(self, file: str) -> list[dict]:
        return [json.loads(line) for line in self.read(file).split(b"\n")[:-1]]

    def events(self, kind: str) -> list[dict]:
        return [row for row in self.rows("events.jsonl") if row["event"] == kind]

    @property
    def incident(self) -> dict:
        """The only one."""
        (incident,) = self.events("incident")
        return incident

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.rows("sft/metrics.jsonl") if "loss" in row]

    def wait_for(self, condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
        """Wait until something is so, while the command is at work."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.log.read_text()}"
            assert self.process.poll() is None or condition(), f"it ended before {what}:\n{self.log.read_text()}"
            time.sleep(0.05)

    def reach(self, step: int) -> None:
        self.wait_for(lambda: self.steps and self.steps[-1]["step"] >= step, f"step {step}")

    def worker(self, rank: int) -> dict:
        """Where a worker of the present attempt is: machine and pid."""
        return self.events("workers")[-1]["workers"][rank]

    def finish(self, status: int = 0) -> str:
        """What it printed, once it has ended with the status."""
        found = self.process.wait(LIMIT_S)
        out = self.log.read_text()
        assert found == status, out
        return out

    @property
    def result(self) -> Result:
        weights = self.read("sft/model/model.safetensors") or self.read("sft/model/adapter_model.safetensors")
        return Result([row["loss"] for row in self.steps], weights)

    def close(self) -> None:
        if hasattr(self, "process") and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(60)


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory) -> Result:
    run = Run(tiny, tmp_path_factory.mktemp("undisturbed"))
    run.start()
    run.finish()
    return run.result


@pytest.fixture
def run(tiny, tmp_path) -> Iterator[Run]:
    run = Run(tiny, tmp_path)
    yield run
    run.close()
