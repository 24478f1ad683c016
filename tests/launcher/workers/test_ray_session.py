"""A Ray of our own: signals for the job do not reach it, and what ends of it all the same costs a moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile

import psutil
import pytest

from tests.launcher.driver.test_run import nothing_left, processes_of
from tests.support.disturbed import Run

__all__ = ["nothing_left"]
pytestmark = pytest.mark.cpu


def kill(temporary: str, what: str) -> None:
    """`kill -9` of a process that was started with this folder for temporary files, by a part of its command."""
    ours = [psutil.Process(pid) for pid in processes_of(temporary)]
    next(process for process in ours if what in " ".join(process.cmdline())).kill()


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
    assert "Ray has ended and does not start again" in out
    assert "Read-only file system" in out
    assert run.events("checkpoint")[-1]["step"] == run.steps[-1]["step"]
    monkeypatch.delenv("TMPDIR")
    run.start(verb="resume")
    run.finish()
    assert run.result == undisturbed


def go_on(run: Run, attempt: int) -> None:
    """Until an attempt has done some steps."""
    run.wait_for(lambda: len(run.events("training")) == attempt, f"attempt {attempt}")
    run.wait_for(lambda: run.steps[-1]["attempt"] == attempt and run.steps[-1]["step"] % 20 > 5, "steps")
