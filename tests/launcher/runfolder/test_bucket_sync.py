"""Runs in a bucket as a person uses them: the real command, no folder shared with anybody, any machine can go on."""

from __future__ import annotations

import json

import pytest

from launcher.driver import open_run
from launcher.jobfile import job as jobs
from launcher.runfolder import run_folder
from launcher.runfolder.small_files import SmallFiles
from tests.launcher.driver.test_run import ctrl_c, finish, make_folder, start, wait_for
from tests.support.forked_command import muster
from training.errors import InputError, StorageError, Superseded
from training.storage import open_storage as place_at

pytestmark = pytest.mark.cpu

STEPS = 40


def rows(address: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (place_at(address) / name).read().splitlines()]


def losses(address: str) -> list[float]:
    return [row["loss"] for row in rows(address, "sft/metrics.jsonl") if "loss" in row]


def steps_done(address: str) -> int:
    try:
        return len(losses(address))
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Losses of an undisturbed run in a folder."""
    folder = make_folder(tiny, tmp_path_factory.mktemp("whole"), steps=STEPS)
    status, out = muster(folder, "run", "job.yaml", "--inline", "resources.workers=1")
    assert status == 0, out
    text = (folder / "runs/job/sft/metrics.jsonl").read_text()
    return [row["loss"] for row in map(json.loads, text.splitlines()) if "loss" in row]


@pytest.mark.faults
def test_workers_on_ray_keep_a_run_in_a_bucket_and_another_machine_goes_on(s3, tiny, tmp_path, whole):
    folder, storage = make_folder(tiny, tmp_path, steps=STEPS), f"{s3.url}/runs"
    often = "phases.sft.checkpoint.every=5"
    process = start(folder, "run", "job.yaml", f"storage={storage}", "phases.sft.max_steps=100000", often)
    wait_for(lambda: steps_done(f"{storage}/job") >= 1, "a step in the bucket")
    ctrl_c(process)
    status, out = finish(process)
    assert status == 130, out
    assert f"muster resume {storage}/job" in out
    done = steps_done(f"{storage}/job")
    assert not (folder / "runs").exists()
    more = f"phases.sft.max_steps={done + 10}"  # another schedule: only what was done can be compared
    other = {"MUSTER_CACHE": str(tmp_path / "another machine's cache")}
    status, out = muster(folder, "resume", f"{storage}/job", more, "--accept-changes", **other)
    assert status == 0, out
    assert f"resuming after step {done}" in out
    curve = [row["step"] for row in rows(f"{storage}/job", "sft/metrics.jsonl") if "loss" in row]
    assert curve == list(range(1, done + 11))
    assert {"config.json", "model.safetensors"} <= place_at(f"{storage}/job/sft/model").children().keys()


@pytest.fixture
def storage(s3, tiny, tmp_path, whole) -> str:
    """The address of a run of two phases in a bucket, done inline."""
    folder, storage = make_folder(tiny, tmp_path, steps=STEPS), f"{s3.url}/runs"
    text = (folder / "job.yaml").read_text()
    again = text[text.index("  sft:") :].replace("  sft:", "  again:\n    recipe: sft", 1).replace(str(STEPS), "3")
    (folder / "job.yaml").write_text(text + again)
    status, out = muster(folder, "run", "job.yaml", "--inline", "resources.workers=1", f"storage={storage}")
    assert status == 0, out
    return storage


def test_a_run_in_a_bucket_is_looked_at_exported_and_tried_by_its_address(storage, tmp_path, whole, s3):
    run = f"{storage}/job"
    assert losses(run) == whole, "bit for bit that of a run in a folder"
    assert rows(run, "events.jsonl")[-1]["event"] == "done"
    second = [row["loss"] for row in rows(run, "again/metrics.jsonl") if "loss" in row]
    assert second[0] < whole[0] / 2, "the second phase started from the model of the first, in the bucket"

    status, out = muster(tmp_path, "status", run)
    assert (status, out.splitlines()[0].split(",")[0]) == (0, "job: done")
    status, out = muster(tmp_path, "list", "--storage", storage)
    assert (status, out.split()[:2]) == (0, ["job", "done"])
    status, out = muster(tmp_path, "checkpoints", run, "--verify")
    assert (status, "sft step      40  verified" in out) == (0, True)
    status, out = muster(tmp_path, "export", run, "--phase", "sft", "--out", f"{s3.url}/models/mine")
    assert status == 0, out
    status, out = muster(tmp_path, "export", run, "--phase", "sft", "--out", str(tmp_path / "mine"))
    assert status == 0, out
    assert (tmp_path / "mine/model.safetensors").read_bytes() == place_at(f"{run}/sft/model/model.safetensors").read()
    for model in (run, f"{s3.url}/models/mine"):
        status, out = muster(tmp_path, "generate", model, "-p", "Q: 1 + 2 = ", "--max-new-tokens", "4")
        assert (status, out.splitlines()[0]) == (0, "prompt:   Q: 1 + 2 =")

    status, out = muster(tmp_path, "resume", run)
    assert (status, "this run is finished" in out) == (2, True)
    status, out = muster(tmp_path, "resume", run, "--inline", "--phase", "sft", "--step", str(STEPS - 5))
    assert (status, f"no checkpoint of step {STEPS - 5}; there are: 40" in out) == (2, True)


# What begins in a bucket, without training


@pytest.fixture
def job(place, s3) -> jobs.Job:
    return jobs.load(place / "job.yaml", [f"storage={s3.url}/runs"])


def test_a_later_attempt_takes_a_run_over_and_the_older_one_writes_no_more(job, monkeypatch, tmp_path):
    old = open_run.begin(job)
    old.event("training", phase="sft")
    old.flush()
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "another machine's cache"))
    new = open_run.begin(job)
    assert (old.attempt, new.attempt) == (1, 2)
    assert [event["event"] for event in new.events()] == ["started", "training", "started"]
    old.event("failed")
    with pytest.raises(Superseded, match="attempt 2 has taken over; this is attempt 1"):
        old.flush()
    with pytest.raises(Superseded):
        old.close()
    new.close()
    seen = run_folder.find(old.address).events()
    assert [(event["attempt"], event["event"]) for event in seen] == [(1, "started"), (1, "training"), (2, "started")]


def test_a_run_says_whether_it_is_at_work(job):
    run = open_run.begin(job)
    assert run_folder.find(run.address).state() == "running"
    run.close()
    assert run_folder.find(run.address).state() == "lost"


def test_two_processes_of_one_machine_cannot_work_on_one_run(job):
    run = open_run.begin(job)
    with pytest.raises(InputError, match="this run is in use by process"):
        open_run.begin(job)
    run.close()


def test_a_run_that_is_closed_copies_no_more(job):
    run = open_run.begin(job)
    copying = run._mirror._thread
    run.close()
    assert not copying.is_alive()


def test_what_is_in_the_bucket_is_the_truth(job, monkeypatch, tmp_path):
    run = open_run.begin(job)
    run.phase("sft").mkdir()
    SmallFiles().append(run.phase("sft") / run_folder.METRICS, {"step": 1, "loss": 1.0})
    run.close()
    SmallFiles().append(
        run.phase("sft") / run_folder.METRICS, {"step": 2, "loss": 1.0}
    )  # as of a driver killed before it was copied
    again = open_run.begin(job)
    assert [row["step"] for row in again.metrics("sft")] == [1]
    again.close()


def test_a_bucket_with_something_else_or_another_job_is_refused(job, s3):
    (place_at(f"{s3.url}/runs/sums") / "thesis.tex").write(b"x")
    with pytest.raises(InputError, match=r"not a run folder, and not empty \(it holds thesis.tex\)"):
        open_run.check(job)
    (place_at(f"{s3.url}/runs/sums") / "thesis.tex").remove()
    open_run.begin(job).close()
    with pytest.raises(InputError, match=r"a different job; .*\n  phases.sft.learning_rate: 0.001 -> 0.5"):
        open_run.check(jobs.load(job.file, [f"storage={job.storage}", "phases.sft.learning_rate=0.5"]))


def test_a_bucket_that_cannot_be_used_is_told_in_one_line(job, s3, monkeypatch):
    nowhere = jobs.load(job.file, ["storage=s3://no-such-bucket/runs"])
    with pytest.raises(InputError, match="no-such-bucket.*does not exist"):
        open_run.begin(nowhere)
    monkeypatch.setattr(open_run, "PATIENCE_S", 1)
    monkeypatch.setattr(run_folder, "PATIENCE_S", 1)
    with s3.faults.unreachable():
        for action in (
            lambda: open_run.check(job),
            lambda: run_folder.find(f"{job.storage}/sums"),
            lambda: run_folder.runs_in(job.storage),
        ):
            with pytest.raises(InputError, match="the storage does not answer: .*; check the network, the address"):
                action()


def test_an_outage_does_not_disturb_the_run_and_a_lasting_one_is_told_at_the_end(job, s3, monkeypatch):
    monkeypatch.setenv("MUSTER_STORAGE_PATIENCE_S", "1")
    run = open_run.begin(job)
    with s3.faults.unreachable():
        run.event("training", phase="sft")
    run.flush()
    assert run_folder.find(run.address).events()[-1]["event"] == "training"
    with s3.faults.unreachable(), pytest.raises(StorageError):
        run.close()
