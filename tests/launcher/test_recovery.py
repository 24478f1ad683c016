"""A run that goes on by itself: real faults at real workers, by the real command, and the result of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.launcher.test_run import nothing_left

__all__ = ["nothing_left"]
pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nothing_left")]


def test_killed_workers_cost_the_steps_since_the_checkpoint(run, undisturbed):
    run.start()
    run.reach(20)
    os.kill(run.worker(1)["pid"], signal.SIGKILL)
    run.wait_for(lambda: len(run.events("started")) == 2, "the second attempt")
    run.reach(60)
    os.kill(run.worker(0)["pid"], signal.SIGKILL)
    out = run.finish()
    first, second = run.events("incident")
    assert (first["class"], first["rank"], first["retry"]) == ("killed", 1, True)
    assert (second["class"], second["rank"]) == ("killed", 0)
    assert second["checkpoint"] >= 40
    assert [row["attempt"] for row in run.events("started")] == [1, 2, 3]
    assert "sft: killed: worker 1 on 127.0.0.1 was killed by SIGKILL" in out
    assert run.result == undisturbed


def test_a_worker_killed_while_it_saves(run, undisturbed):
    """Its shard is being written, so that checkpoint never comes to be."""
    run.start("phases.sft.checkpoint.every=1")
    run.reach(30)
    os.kill(run.worker(1)["pid"], signal.SIGKILL)
    run.finish()
    assert run.incident["step"] - 1 - run.incident["checkpoint"] <= 2
    assert run.result == undisturbed


def test_the_place_of_a_worker_is_killed(run, undisturbed):
    """The Ray actor, with the nursery: nothing is left to begin again with, so new places are taken."""
    run.start()
    run.reach(20)
    nursery = psutil.Process(run.worker(1)["pid"]).parent()
    os.kill(nursery.ppid(), signal.SIGKILL)
    run.finish()
    assert (run.incident["class"], run.incident["rank"]) == ("killed", 1)
    assert "with the process that watched over it" in run.incident["message"]
    assert run.result == undisturbed


def test_a_stopped_worker_is_a_hang_with_the_stacks_of_the_others(run, undisturbed):
    hang_after = 3
    run.start(f"resources.hang_after={hang_after}")
    run.reach(20)
    began = time.monotonic()
    os.kill(run.worker(1)["pid"], signal.SIGSTOP)
    run.wait_for(lambda: run.events("incident"), "the hang")
    # Stacks are waited for before it is told.
    assert hang_after <= time.monotonic() - began < hang_after + 5 + 5
    run.finish()
    assert (run.incident["class"], run.incident["rank"]) == ("hang", 1)
    assert "is stopped (state T)" in run.incident["message"]
    stacks = (run.folder / "runs/job/sft/logs/attempt-1/stacks.txt").read_text()
    assert "== worker 1 on 127.0.0.1\ndoes not answer" in stacks
    assert "in train" in stacks.partition("== worker 1")[0]
    assert run.result == undisturbed


def test_a_slow_save_and_a_slow_worker_are_no_hang(run, undisturbed):
    """Stopped for less than hang_after, again and again."""
    run.start("resources.hang_after=4")
    for step in (20, 40):
        run.reach(step)
        pid = run.worker(0)["pid"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(pid, signal.SIGCONT)
    run.finish()
    assert run.events("incident") == []
    assert run.result == undisturbed


def test_an_error_in_the_program_is_not_tried_again(run, tiny):
    """A row's tokens are damaged on disk, so that the model raises: told with the traceback of the worker that it hit."""
    run.start("phases.sft.checkpoint.every=5", "phases.sft.micro_tokens=100", "phases.sft.data.max_length=16")
    out = run.finish(status=1)
    assert run.incident["retry"] is False, out
    assert "error in the program comes back every time" in out
    assert len(run.events("started")) == 1
    assert Path(run.folder / "runs/job/sft/checkpoints").exists()


def test_the_same_death_at_the_same_step_is_given_up(run):
    run.start("phases.sft.checkpoint.every=1000")
    for attempt in (1, 2):
        run.wait_for(lambda attempt=attempt: len(run.events("training")) == attempt, f"attempt {attempt}")
        os.kill(run.worker(1)["pid"], signal.SIGKILL)
        run.wait_for(lambda attempt=attempt: len(run.events("incident")) == attempt, f"incident {attempt}")
    run.process.wait(60)
    steps = [incident["step"] for incident in run.events("incident")]
    assert run.events("incident")[-1]["retry"] is (steps[0] != steps[1])
