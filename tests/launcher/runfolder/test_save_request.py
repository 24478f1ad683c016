"""`muster save`: the driver saves between two calls and goes on; the answer is the checkpoint, or why there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher
from cluster.providers.slurm import SlurmProvider
from cluster.spec import Slurm
from launcher.driver import open_run
from launcher.driver.open_run import OpenRun
from launcher.jobfile import job as jobs
from launcher.runfolder import run_folder, save_request
from launcher.runfolder.bucket_sync import SAVE
from tests.support.disturbed import COMMAND
from training.checkpoint.format import Manifest
from training.checkpoint.repository import Checkpoints, step_of
from training.errors import InputError, TrainingError
from training.storage import open_storage as storage_at

LIMIT_S = 60


@pytest.fixture(params=["folder", "bucket"])
def run(request, place):
    """A run whose phase trains."""
    where = "runs" if request.param == "folder" else request.getfixturevalue("s3").url + "/runs"
    opened = open_run.begin(jobs.load(Path("job.yaml"), [f"storage={where}", "track=[]"]))
    opened.event("phase_started", phase="sft")
    opened.event("training", phase="sft", step=0, total_steps=9)
    opened.flush()
    yield opened
    opened.close()


def asked(run: OpenRun, *then: tuple[str, dict], step: int = 7) -> dict:
    """What `muster save` answers when the driver takes the request after a step, and then these events come."""
    is_over = threading.Event()

    def drive() -> None:
        while not is_over.is_set():
            run.flush()
            if (identity := save_request.take(run)) is not None:
                run.event("save_requested", phase="sft", step=step, id=identity)
                for kind, fields in then:
                    run.event(kind, phase="sft", **fields)
            is_over.wait(0.05)

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    try:
        return save_request.request(run_folder.find(run.address))
    finally:
        is_over.set()
        driver.join(LIMIT_S)
        assert SAVE not in run.root.children()


def test_the_answer_is_the_checkpoint_that_is_committed(run):
    run.event("checkpoint", phase="sft", step=5, checkpoint="c/5")
    answer = asked(run, ("save_failed", {"step": 7, "error": "full"}), ("checkpoint", {"step": 8, "checkpoint": "c/8"}))
    assert answer == {"phase": "sft", "step": 8, "checkpoint": "c/8"}


def test_a_step_that_is_saved_already_is_answered_at_once(run):
    run.event("restored", phase="sft", step=7, checkpoint="c/7")
    assert asked(run) == {"phase": "sft", "step": 7, "checkpoint": "c/7"}


def test_a_run_that_has_all_its_steps_saved_is_not_asked(run):
    run.event("checkpoint", phase="sft", step=9, checkpoint="c/9")
    run.flush()
    assert save_request.request(run_folder.find(run.address))["checkpoint"] == "c/9"


def test_where_there_is_nothing_to_save_the_newest_checkpoint_is_named(run):
    with pytest.raises(InputError, match="has not trained a step yet"):
        asked(run, step=0)
    run.event("checkpoint", phase="sft", step=5, checkpoint="c/5")
    run.event("incident", phase="sft", step=6)
    run.flush()
    with pytest.raises(InputError, match=r"trains no step at the moment: .* its newest checkpoint is of step 5 of sft"):
        save_request.request(run_folder.find(run.address))
    run.event("failed", error="-")
    run.flush()
    with pytest.raises(InputError, match=r"is not running \(it is failed\)"):
        save_request.request(run_folder.find(run.address))


def test_a_request_that_nobody_can_have_made_is_answered_all_the_same(run):
    (run.folder / SAVE).write_bytes(b"\xff" * 100_000)
    assert len(save_request.take(run)) == 64
    assert save_request.take(run) is None


def test_a_run_that_ends_before_it_has_saved_says_so(run):
    with pytest.raises(TrainingError, match="saving failed: it has ended; it has no checkpoint yet"):
        asked(run, ("failed", {"error": "-"}))


def test_the_login_machine_of_slurm_asks_a_job_by_the_folder_of_its_run(tmp_path, run):
    """With what the job was submitted with, which lies in its folder."""
    (tmp_path / "jobs/one").mkdir(parents=True)
    (tmp_path / "jobs/one/code").symlink_to(Path(launcher.__file__).parents[1])
    spec = Slurm(provider="slurm", name="s", folder=str(tmp_path / "jobs"), workers_per_node=1, python=sys.executable)
    run.event("checkpoint", phase="sft", step=9, checkpoint="c/9")
    run.flush()
    answer = SlurmProvider(spec).save("one", run.address)
    assert json.loads(answer.splitlines()[-1]) == {"phase": "sft", "step": 9, "checkpoint": "c/9"}
    run.event("incident", phase="sft", step=9)
    run.flush()
    assert "trains no step at the moment" in json.loads(SlurmProvider(spec).save("one", run.address))["error"]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_in(run: Path) -> int:
    metrics = run / "sft/metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.cpu
def test_a_run_saves_when_it_is_asked_to_and_goes_on(muster, place):
    forever = ("phases.sft.max_steps=1000000", "phases.sft.checkpoint.every=500000")
    with Path("out.txt").open("w") as out:
        process = subprocess.Popen([*COMMAND, "run", "job.yaml", "--inline", *forever], stdout=out, stderr=out)
    run = Path("runs/sums")
    try:
        until(lambda: steps_in(run) > 3)
        answer = muster("save", "sums", "--json")
        assert answer.status == 0, answer.err
        saved = json.loads(answer.out)
        assert Manifest.read(storage_at(saved["checkpoint"])).step == saved["step"] > 3
        before = steps_in(run)
        until(lambda: steps_in(run) > before)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 75
    (newest,) = Checkpoints(storage_at(run / "sft/checkpoints")).folders()
    assert step_of(newest) > saved["step"], "the one of the end; as after any interruption, the one before it is gone"
    answer = muster("save", "sums")
    assert (answer.status, "is not running (it is interrupted)" in answer.err) == (2, True)
    assert not os.path.exists(run / SAVE)
