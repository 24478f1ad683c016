"""A run that goes on by itself: real faults at real workers, by the real command,
and the result of a run that nobody disturbed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.launcher.driver.test_run import nothing_left, processes_of
from tests.support.disturbed import COMMAND, Run
from training.storage import open_storage

__all__ = ["nothing_left"]
pytestmark = [pytest.mark.cpu, pytest.mark.faults, pytest.mark.usefixtures("nothing_left")]


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


def test_the_place_of_a_worker_is_killed(run, undisturbed, nothing_left):
    """The Ray actor: nothing is left to begin again with, so new places are taken."""
    run.start()
    run.reach(20)
    ours = [psutil.Process(pid) for pid in processes_of(str(nothing_left))]
    next(place for place in ours if place.cmdline()[:1] and place.cmdline()[0].startswith("ray::WorkerActor")).kill()
    run.finish()
    assert run.incident["class"] == "killed"
    assert "with its supervisor process" in run.incident["message"]
    assert run.result == undisturbed


def test_a_stopped_worker_is_a_hang_with_the_stacks_of_the_others(run, undisturbed):
    hang_after = 3
    run.start(f"resources.hang_after={hang_after}")
    run.reach(20)
    began = time.monotonic()
    os.kill(run.worker(1)["pid"], signal.SIGSTOP)
    run.wait_for(lambda: run.events("incident"), "the hang")
    assert hang_after <= time.monotonic() - began
    run.finish()
    assert (run.incident["class"], run.incident["rank"]) == ("hang", 1)
    assert "has been stopped (state T)" in run.incident["message"]
    stacks = (run.folder / "runs/job/sft/logs/attempt-1/stacks.txt").read_text()
    assert "== worker 1 on 127.0.0.1\ndoes not answer" in stacks
    # Whether it waits within a step, or between two blocks of steps when the other stopped there.
    assert "in _serve" in stacks.partition("== worker 1")[0]
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


def test_an_error_in_the_program_is_not_tried_again(run):
    run.start("deepspeed.communication_data_type=nonsense")
    out = run.finish(status=1)
    assert (run.incident["class"], run.incident["retry"]) == ("error in the program", False)
    assert "end of its traceback:" in out
    assert "not retrying: a program error recurs on every attempt" in out
    assert len(run.events("started")) == 1


def test_a_diverged_loss_stops_the_run_or_its_batch_is_left_out(run, undisturbed):
    """The limit is set between the two highest losses that are still to come."""
    run.start()
    run.reach(40)
    run.process.send_signal(signal.SIGTERM)
    run.finish(status=75)
    done = run.steps[-1]["step"]
    second, first = sorted(undisturbed.losses[done:])[-2:]
    limit = f"phases.sft.loss_limit={(first + second) / 2}"
    run.start(limit, verb="resume")
    out = run.finish(status=1)
    worst = undisturbed.losses.index(first) + 1
    assert f"diverged: step {worst}: the loss is {first}" in out
    assert "set on_divergence: skip" in out
    run.start(limit, "phases.sft.on_divergence=skip", verb="resume")
    run.finish()
    assert run.events("incident")[-1]["skip"] == worst
    assert [row["step"] for row in run.rows("sft/metrics.jsonl") if "skipped" in row] == [worst]
    assert run.result.losses[: worst - 1] == undisturbed.losses[: worst - 1]
    assert len(run.result.losses) == len(undisturbed.losses) - 1


def test_a_drill_costs_nothing(run, undisturbed):
    """`muster chaos`, with a checkpoint in between so that it is no matter of chance whether the run is given up."""
    run.start("phases.sft.checkpoint.every=4", "phases.sft.micro_batch=4")
    run.reach(8)
    drill = subprocess.run(
        [*COMMAND, "chaos", str(run.folder / "runs/job"), "--every", "3", "--times", "3"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    run.finish()
    killed = re.findall(r"killed worker (\d), process (\d+)", drill.stdout)
    assert drill.stdout.endswith("3 killed\n")
    assert [str(incident["rank"]) for incident in run.events("incident")] == [rank for rank, _ in killed]
    assert run.result.losses == pytest.approx(undisturbed.losses, rel=1e-5)  # micro-batches round differently


class RunInBucket(Run):
    """What it writes is read from the bucket alone."""

    storage: str

    def read(self, file: str) -> bytes:
        try:
            return open_storage(f"{self.storage}/job/{file}").read()
        except FileNotFoundError:
            return b""


def test_a_run_in_a_bucket_goes_on_too(s3, tiny, tmp_path, undisturbed):
    run = RunInBucket(tiny, tmp_path)
    run.storage = f"{s3.url}/runs"
    try:
        run.start(f"storage={run.storage}", "phases.sft.micro_batch=4")
        run.wait_for(lambda: run.events("checkpoint"), "a checkpoint in the bucket")
        os.kill(run.worker(1)["pid"], signal.SIGKILL)
        run.finish()
    finally:
        run.close()
    assert run.incident["class"] == "killed"
    assert run.incident["checkpoint"] >= 20
    assert [row["attempt"] for row in run.events("started")] == [1, 2]
    assert run.result.losses == pytest.approx(undisturbed.losses, rel=1e-5)  # micro-batches round differently


def test_a_killed_driver_leaves_a_run_that_resumes(run, undisturbed, nothing_left):
    run.start()
    run.reach(40)
    workers = [psutil.Process(run.worker(rank)["pid"]) for rank in (0, 1)]
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(60)
    psutil.wait_procs(workers, 30)
    assert not any(worker.is_running() for worker in workers)
    for leftover in nothing_left.glob("muster-*"):  # Ray's log files, which nobody was left to remove
        shutil.rmtree(leftover)
    run.start(verb="resume")
    run.finish()
    assert run.result == undisturbed
