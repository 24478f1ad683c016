"""Jobs on a cluster that is up: handed over, side by side, waiting, followed, stopped, gone on with.
A real Ray on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]
_PATIENCE_S = 240


class Commands:
    """`muster` as a person types it, with a home of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MUSTER_"))}
        self.environment = {
            **kept,
            "MUSTER_HOME": str(folder / "muster"),
            "MUSTER_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    def __call__(self, *words: str, status: int = 0, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            env={**self.environment, **environment}, capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{words} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def json(self, *words: str) -> Any:
        """What a command prints as JSON; it prints nothing else."""
        return json.loads(self(*words, "--on", "here", "--json"))

    def submitted(self, job: Path, *overrides: str) -> str:
        return self.json("submit", str(job), *overrides)["id"]

    def state(self, name: str) -> str:
        return self.json("status", name)[0]["state"]


def until(seen: Callable[[], bool], told: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not seen():
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)


def marked(mark: str) -> list[psutil.Process]:
    """The processes of a cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MUSTER_CLUSTER") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def muster_here(tmp_path_factory) -> Iterator[Commands]:
    """A cluster with two places for workers, called `here`."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "here.yaml").write_text("provider: local\ncpus: 2\nstop_s: 60\n")
    commands = Commands(folder)
    assert "here is up" in commands("cluster", "up", str(folder / "here.yaml"))
    mark = json.loads((folder / "muster/clusters/here/cluster.json").read_text())["mark"]
    assert marked(mark)
    assert Path(f"/tmp/muster-{mark}").stat().st_mode & 0o777 == 0o700
    yield commands
    commands("cluster", "down", "here", "--force")
    assert marked(mark) == []
    assert not Path(f"/tmp/muster-{mark}").exists()


@pytest.fixture
def job(place) -> Path:
    return place / "job.yaml"


def test_a_job_is_followed_to_its_end_and_its_run_is_where_the_job_says(muster_here, job):
    said = muster_here("run", str(job), "--on", "here")
    assert "sft: done; the model is in" in said
    assert (job.parent / "runs/sums/sft/model/model.safetensors").exists()
    (info,) = [one for one in muster_here.json("list") if one["job"] == "sums"]
    assert (info["state"], info["exit_status"], info["run"]) == ("succeeded", 0, str(job.parent / "runs/sums"))
    assert muster_here("logs", info["id"], "--on", "here") in said
    assert "has already ended: succeeded" in muster_here("stop", info["id"], "--on", "here", status=2)
    assert f"did you mean {info['id']}?" in muster_here("status", info["id"][:-1], "--on", "here", status=2)


def test_a_job_with_bad_rows_fails_with_its_own_words_and_status(muster_here, job):
    (job.parent / "data/train.jsonl").write_text('{"prompt": "a"}\n')
    said = muster_here("run", str(job), "name=bad", "--on", "here", status=2)
    assert "train.jsonl:1" in said
    assert "Traceback" not in said


@pytest.mark.long
def test_two_jobs_run_side_by_side_and_a_third_waits_and_says_for_what(muster_here, job):
    forever = ("phases.sft.max_steps=1000000", "phases.sft.checkpoint.every=500000")
    names = [muster_here.submitted(job, f"name=side-{number}", *forever) for number in range(2)]
    metrics = [job.parent / f"runs/side-{number}/sft/metrics.jsonl" for number in range(2)]
    until(
        lambda: all(file.exists() and file.stat().st_size for file in metrics),
        lambda: muster_here("list", "--on", "here"),
    )
    third = muster_here.submitted(job, "name=third")
    until(
        lambda: "waiting" in muster_here("logs", third, "--on", "here"),
        lambda: muster_here("logs", third, "--on", "here"),
    )
    assert muster_here.state(third) == "running"
    assert all(name in muster_here("cluster", "down", "here", status=2) for name in (*names, third))

    assert "stopped" in muster_here("stop", names[0], "--on", "here")
    events = [json.loads(line)["event"] for line in (job.parent / "runs/side-0/events.jsonl").open()]
    assert "checkpoint" in events  # it was to save every 500,000 steps: this one was made because it was asked to stop
    said = muster_here("logs", "-f", third, "--on", "here")
    assert "sft: done" in said

    assert "is running; `muster stop" in muster_here("resume", names[1], "--on", "here", status=2)
    again = muster_here("resume", names[0], "phases.sft.log_every=2", "--on", "here").split()[0]
    until(
        lambda: "resuming after step" in muster_here("logs", again, "--on", "here"),
        lambda: muster_here("logs", again, "--on", "here"),
    )
    for name in (again, names[1]):
        muster_here("stop", name, "--on", "here")


def test_a_secret_reaches_the_workers_and_stands_nowhere(muster_here, job):
    (job.parent / "data/train.jsonl").rename(job.parent / "data/rows.jsonl")
    job.write_text(
        "env: [MY_SECRET]\n"
        + job.read_text().replace("train.jsonl", "rows.jsonl").replace("name: sums", "name: secretive")
    )
    overrides = ("phases.sft.max_steps=1000000", "phases.sft.checkpoint.every=500000")
    said = muster_here("submit", str(job), *overrides, "--on", "here", "--json", MY_SECRET="hush-hush-7")
    name, metrics = json.loads(said)["id"], job.parent / "runs/secretive/sft/metrics.jsonl"
    until(lambda: metrics.exists(), lambda: muster_here("logs", name, "--on", "here"))
    mark = json.loads((muster_here.folder / "muster/clusters/here/cluster.json").read_text())["mark"]
    before = len(muster_here.json("list"))
    fork_servers = [process for process in marked(mark) if "launcher.workers.fork_server" in process.cmdline()]
    assert {process.environ().get("MY_SECRET") for process in fork_servers} == {"hush-hush-7"}
    saved = json.loads(muster_here("save", name, "--on", "here", "--json"))
    assert (Path(saved["checkpoint"]) / "manifest.json").exists()
    assert len(muster_here.json("list")) == before, "what has asked for it is no job of its own"
    muster_here("stop", name, "--on", "here")
    assert "is not running (it is stopped)" in muster_here("save", name, "--on", "here", status=2)
    places = [f"/tmp/muster-{mark}", str(muster_here.folder), str(job.parent)]
    found = subprocess.run(["grep", "-rlaF", "hush-hush-7", *places], capture_output=True, text=True, check=False)
    assert found.stdout == ""
