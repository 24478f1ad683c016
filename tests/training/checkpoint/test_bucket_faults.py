"""Training with checkpoints in a bucket that misbehaves: no step is lost, and no half checkpoint comes into being."""

from __future__ import annotations

import threading

import pytest

from tests.support.training_fixtures import Recorder
from training.checkpoint.format import Manifest, Reader, verify
from training.checkpoint.repository import Checkpoints, step_of
from training.storage import open_storage

pytestmark = [pytest.mark.cpu, pytest.mark.faults]

SETTINGS = {"stage": 2, "max_steps": 12, "checkpoint": {"every": 2, "keep": 2}}


@pytest.fixture(scope="module")
def whole(train):
    return train(2, **SETTINGS)


def state(checkpoint):
    reader = Reader(checkpoint)
    return {name: reader.whole(name).tobytes() for name in reader.manifest.parameters}


def assert_as_undisturbed(url, runs, whole):
    assert [loss for run in runs for loss in run.losses] == whole.losses
    folders = Checkpoints(open_storage(url)).folders()
    assert [step_of(folder) for folder in folders] == [10, 12]
    assert [verify(folder) for folder in folders] == [[], []]
    assert state(folders[-1]) == state(whole.last)


def test_a_run_goes_on_from_a_bucket_bit_for_bit(train, whole, s3):
    url = s3.url + "/run"
    first = train(2, checkpoints=url, stop_after=7, **SETTINGS)
    second = train(2, checkpoints=url, **SETTINGS)
    assert second.first == len(first.losses)
    assert_as_undisturbed(url, [first, second], whole)


def test_each_worker_uploads_its_own_shard_and_fetches_what_it_needs(train, whole, s3):
    train(2, checkpoints=s3.url + "/run", **SETTINGS)
    files = Manifest.read(Checkpoints(open_storage(s3.url + "/run")).at(12)).files
    assert [file.name.rpartition("/")[2] for file in files] == [
        "trainer-00000.safetensors",
        "trainer-00000.optimizer.safetensors",
        "trainer-00001.safetensors",
        "trainer-00001.optimizer.safetensors",
    ]
    more = train(3, checkpoints=s3.url + "/run", stage=3, max_steps=14, checkpoint={"every": 2}, job_hash="0" * 16)
    assert more.first == 12


@pytest.mark.parametrize(
    "trouble",
    [
        lambda faults: faults.fail_rate(0.1, seed=3),
        lambda faults: faults.cut_after(100_000, times=6, method="PUT", key_contains="worker-"),
        lambda faults: faults.cut_after(1000, times=4, key_contains="manifest"),
        lambda faults: faults.lose_answer(3, method="PUT", key_contains="manifest"),
        lambda faults: vars(faults).update(bytes_per_s=2e6),
    ],
    ids=["503", "uploads cut", "manifest cut", "answers lost", "slow"],
)
def test_a_bucket_that_misbehaves_costs_time_alone(train, whole, s3, trouble):
    trouble(s3.faults)
    run = train(2, checkpoints=s3.url + "/run", **SETTINGS)
    assert_as_undisturbed(s3.url + "/run", [run], whole)


class GoesAway(Recorder):
    """A run whose storage goes away when its second checkpoint is begun."""

    def log(self, row):
        super().log(row)
        if row["step"] == 4:
            self.faults.down(self.seconds)


@pytest.mark.parametrize("seconds", [5, 60])
def test_storage_that_is_away_for_a_while_costs_time_alone(train, whole, s3, seconds):
    kind = type("Goes", (GoesAway,), {"faults": s3.faults, "seconds": seconds})
    run = train(2, checkpoints=s3.url + "/run", hooks=kind, **SETTINGS)
    assert [fields for event, fields in run.events if event == "save_failed"] == []
    assert_as_undisturbed(s3.url + "/run", [run], whole)


def test_storage_that_is_away_for_longer_than_patience_fails_a_save_which_is_made_good(train, whole, s3, monkeypatch):
    monkeypatch.setenv("MUSTER_STORAGE_PATIENCE_S", "1")

    class Back(Recorder):
        def event(self, event, **fields):
            super().event(event, **fields)
            if event == "save_failed":
                gone.__exit__(None, None, None)

        def log(self, row):
            super().log(row)
            if row["step"] == 8:
                gone.__enter__()

    gone = s3.faults.unreachable()
    run = train(2, checkpoints=s3.url + "/run", hooks=Back, **SETTINGS)
    told = [fields for event, fields in run.events if event == "save_failed"]
    assert len(told) == 1
    assert "the storage does not answer" in told[0]["error"]
    assert_as_undisturbed(s3.url + "/run", [run], whole)
    steps = [name for name in open_storage(s3.url + "/run").children() if name.startswith("step-")]
    assert steps == ["step-00000010", "step-00000012"], "the failed upload was removed when that was possible"


def test_a_bucket_that_may_not_be_written_is_told_before_training(train, s3):
    with pytest.raises(FileNotFoundError):
        train(1, checkpoints="s3://no-such-bucket/run", **SETTINGS)


def test_a_worker_killed_in_the_middle_of_an_upload_leaves_the_checkpoint_before(train, whole, s3, tiny):
    import os
    import signal

    from tests.support.fork_group import ForkGroup
    from tests.support.training_fixtures import sft_phase
    from training.drivers import supervised
    from training.errors import TrainingError

    phase, hooks = sft_phase(tiny, workers=2, **SETTINGS), Recorder(s3.url + "/run")
    with ForkGroup(2, "training.roles.language:LanguageTrainer", phase, str(tiny / "cache")) as group:

        def slow_and_kill():
            s3.faults.bytes_per_s = 3e5
            threading.Timer(0.7, os.kill, (group.processes[1].pid, signal.SIGKILL)).start()

        hooks.event = lambda kind, **fields: (
            slow_and_kill() if (kind, fields.get("step")) == ("checkpoint", 4) else None
        )
        with pytest.raises(TrainingError):
            supervised.run(phase, {"trainer": group}, hooks)
    s3.faults.bytes_per_s = None
    newest, findings = Checkpoints(open_storage(s3.url + "/run")).newest_whole()
    assert (step_of(newest), findings) == (4, [])
    second = train(2, checkpoints=s3.url + "/run", **SETTINGS)
    assert second.losses == whole.losses[4:]
