"""A Ray of our own: signals for the job do not reach it, and what ends of it all the same costs a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from launcher import session
from tests.disturbed import Run
from tests.launcher.test_run import nothing_left, processes_of

__all__ = ["nothing_left"]
pytestmark = pytest.mark.cpu

ANSWERS = """
import os, signal, sys
import ray
from launcher import session

def handler(*_): ...
signal.signal(signal.SIGTERM, handler)

if __name__ == "__main__":
    with session.ray_session(1):
        assert signal.getsignal(signal.SIGTERM) is handler, "Ray has taken SIGTERM"
        for name in sys.argv[1:]:
            assert session.lost() is None
            process = session._own._processes[name]
            process.kill()
            process.wait()
            print(session.lost())
            session.restart()
            print(ray.get(ray.remote(lambda: "it works").remote(), timeout=60))
"""


@pytest.mark.usefixtures("ray_cluster")
def test_no_process_of_ray_is_in_our_process_group():
    ours = psutil.Process().children(recursive=True)
    names = " ".join(" ".join(process.cmdline()) for process in ours)
    assert all(part in names for part in ("gcs_server", "raylet", "log_monitor", "dashboard", "launcher.nursery"))
    assert [process for process in ours if os.getpgid(process.pid) == os.getpgid(0)] == []


def test_another_ray_is_started_for_one_that_has_ended(nothing_left, tmp_path):
    (tmp_path / "answers.py").write_text(ANSWERS)
    command = [sys.executable, str(tmp_path / "answers.py"), "gcs_server", "raylet"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "RAY_ADDRESS": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines() == [
        str(session.Lost("Ray's gcs_server was killed by SIGKILL", workers_answer=True)),
        "it works",
        str(session.Lost("Ray's raylet was killed by SIGKILL", workers_answer=False)),
        "it works",
    ]


def kill(temporary: str, what: str) -> None:
    """`kill -9` of a process that was started with this folder for temporary files, by a part of its command."""
    ours = [psutil.Process(pid) for pid in processes_of(temporary)]
    next(process for process in ours if what in " ".join(process.cmdline())).kill()


@pytest.mark.faults
def test_what_ends_beside_the_workers_costs_the_steps_since_the_checkpoint_at_most(run: Run, undisturbed, nothing_left):
    """The GCS: nothing. The raylet, and the process that workers are forked from: as a lost machine. A signal to the group: nothing."""
    run.start()
    run.reach(10)
    kill(str(nothing_left), "gcs_server")
    run.wait_for(lambda: run.events("moved"), "the save")
    assert run.events("moved")[0]["why"] == "Ray's gcs_server was killed by SIGKILL"
    assert run.events("incident") == []
    saved = run.events("checkpoint")[-1]["step"]
    run.reach(saved + 20)
    kill(str(nothing_left), "raylet/raylet")
    run.wait_for(lambda: len(run.events("started")) == 3, "another Ray")
    run.reach(saved + 30)
    kill(str(nothing_left), "launcher.nursery")
    run.wait_for(lambda: len(run.events("started")) == 4, "other workers")
    run.reach(saved + 40)
    os.killpg(run.process.pid, signal.SIGTERM)
    run.finish(status=75)
    assert [incident["class"] for incident in run.events("incident")] == ["lost machine", "killed"]
    done = run.steps[-1]["step"]
    run.start(verb="resume")
    out = run.finish()
    assert f"goes on after step {done}" in out
    assert run.result == undisturbed
