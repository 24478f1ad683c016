"""A Ray of our own: signals for the job do not reach it, and what ends of it all the same costs a moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress

import psutil
import pytest

from tests.launcher.driver.test_run import nothing_left, processes_of
from tests.support.disturbed import Run

__all__ = ["nothing_left"]
pytestmark = pytest.mark.cpu


def kill(temporary: str, what: str) -> None:
    """`kill -9` of a process that was started with this TMPDIR, or of a child of one, by a part of its command.

    The agents of the raylet are found as its children: the titles that they set overwrite their environment.
    """
    ours = [psutil.Process(pid) for pid in processes_of(temporary)]
    family = [*ours, *(child for process in ours for child in process.children())]
    next(process for process in family if what in command_of(process)).kill()


def command_of(process: psutil.Process) -> str:
    """Empty if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.faults
def test_what_ends_beside_the_workers_costs_the_steps_since_the_checkpoint_at_most(run: Run, undisturbed, nothing_left):
    """The GCS: nothing. The raylet, and the process that workers are forked from: as a lost machine.
    A signal to the group: nothing."""
    run.start()
    run.reach(10)
    kill(str(nothing_left), "gcs_server")
    run.wait_for(lambda: run.events("moved"), "the save")
    assert run.events("moved")[0]["why"] == "Ray's gcs_server was killed by SIGKILL"
    assert run.events("incident") == []
    go_on(run, attempt=2)
    kill(str(nothing_left), "raylet/raylet")
    go_on(run, attempt=3)
    kill(str(nothing_left), "launcher.workers.fork_server")
    go_on(run, attempt=4)
    os.killpg(run.process.pid, signal.SIGTERM)
    run.finish(status=75)
    assert [incident["class"] for incident in run.events("incident")] == ["lost machine", "killed"]
    assert run.events("checkpoint")[-1]["step"] == run.steps[-1]["step"]
    run.start(verb="resume")
    run.finish()
    assert run.result == undisturbed


@pytest.mark.faults
def test_an_agent_of_the_raylet_costs_what_the_raylet_costs(run: Run, undisturbed, nothing_left):
    """The raylet ends as soon as one of its two agents does, and another Ray is started. Ray's other processes cost
    nothing."""
    run.start()
    run.reach(10)
    for helper in ("dashboard/dashboard.py", "autoscaler/_private/monitor.py", "log_monitor.py"):
        kill(str(nothing_left), helper)
    kill(str(nothing_left), "ray::DashboardAgent")
    go_on(run, attempt=2)
    kill(str(nothing_left), "ray::RuntimeEnvAgent")
    go_on(run, attempt=3)
    run.finish()
    assert [incident["class"] for incident in run.events("incident")] == ["lost machine"] * 2
    assert run.result == undisturbed


@pytest.mark.faults
def test_where_no_ray_starts_again_the_run_is_saved_and_can_be_resumed(run: Run, undisturbed, monkeypatch):
    temporary = tempfile.mkdtemp(prefix="mt-", dir="/tmp")
    monkeypatch.setenv("TMPDIR", temporary)
    run.start()
    run.reach(10)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", temporary], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        kill(temporary, "gcs_server")
        out = run.finish(status=75)
    finally:
        subprocess.run(["umount", "--lazy", temporary], check=True)
        shutil.rmtree(temporary)
    assert "Ray ended and could not be restarted" in out
    assert "Read-only file system" in out
    assert run.events("checkpoint")[-1]["step"] == run.steps[-1]["step"]
    monkeypatch.delenv("TMPDIR")
    run.start(verb="resume")
    run.finish()
    assert run.result == undisturbed


def go_on(run: Run, attempt: int) -> None:
    """Until an attempt has done more steps than any before it: the same failure at the same step twice ends the run."""
    run.wait_for(lambda: len(run.events("training")) == attempt, f"attempt {attempt}")
    failed = max((incident["step"] for incident in run.events("incident")), default=0)

    def has_done_some() -> bool:
        if not run.steps:  # what is done again is taken out of the curve
            return False
        last = run.steps[-1]
        return last["attempt"] == attempt and last["step"] > failed and last["step"] % 20 > 5

    run.wait_for(has_done_some, "steps")
