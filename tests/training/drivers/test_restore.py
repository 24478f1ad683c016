"""Which checkpoint a run goes on from: the newest whole one, or the one that is asked for,
of this job and these data."""

import json
from dataclasses import replace

import pytest

from training.checkpoint.format import CheckpointError, Manifest, NewerFormat
from training.checkpoint.repository import Checkpoints, step_of
from training.drivers.restore import _refuse_change
from training.errors import InputError
from training.storage import open_storage

pytestmark = pytest.mark.cpu


@pytest.fixture
def stopped(train, tmp_path):
    """A run that was stopped after step 6 of 8: checkpoints of steps 2, 4 and 6."""
    run = train(2, stage=2, checkpoints=tmp_path, stop_after=6, checkpoint={"every": 2})
    assert steps(tmp_path) == [2, 4, 6]
    return run


@pytest.fixture(scope="module")
def whole(train):
    return train(2, stage=2).losses


def steps(folder):
    return [step_of(checkpoint) for checkpoint in Checkpoints(open_storage(folder)).folders()]


def damage(folder, step, name="trainer-00001.safetensors"):
    path = folder / f"step-{step:08d}" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def advance(train, folder, workers=2, **settings):
    return train(workers, stage=2, checkpoints=folder, checkpoint={"every": 2}, **settings)


def told(run, kind):
    return [fields for event, fields in run.events if event == kind]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_damaged_checkpoint_is_told_set_aside_and_the_one_before_is_used(train, stopped, whole, tmp_path, workers):
    damage(tmp_path, 6)
    run = advance(train, tmp_path, workers)
    assert run.first == 4
    assert run.losses == pytest.approx(whole[4:], rel=1e-5)
    assert "trainer-00001.safetensors: the content has changed" in told(run, "checkpoint_damaged")[0]["finding"]
    assert [fields["step"] for fields in told(run, "checkpoint_set_aside")] == [6]
    assert steps(tmp_path) == [4, 6, 8]


def test_two_damaged_ones_in_different_ways(train, stopped, whole, tmp_path):
    damage(tmp_path, 6, "trainer-00000.safetensors")
    (tmp_path / "step-00000004" / "manifest.json").write_text("{")
    run = advance(train, tmp_path)
    assert run.first == 2
    assert run.losses == whole[2:], "bit for bit"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(train, stopped, tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        advance(train, tmp_path)


def test_a_run_whose_older_checkpoints_have_weights_alone_goes_on_from_the_others_only(train, whole, tmp_path):
    settings = {"stage": 2, "checkpoint": {"every": 2, "keep": 2, "keep_weights": 2}}
    train(2, checkpoints=tmp_path, stop_after=6, **settings)
    assert steps(tmp_path) == [2, 4, 6]
    weights = [Manifest.read(folder).weights_only for folder in Checkpoints(open_storage(tmp_path)).folders()]
    assert weights == [True, False, False]
    damage(tmp_path, 6)
    run = train(2, checkpoints=tmp_path, stop_after=6, **settings)
    assert (run.first, run.losses) == (4, whole[4:6])
    for step in (4, 6):
        damage(tmp_path, step)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole; those with weights alone \(2; .*cannot be resumed"
    ):
        train(2, checkpoints=tmp_path, **settings)


def test_a_run_goes_on_from_the_step_that_is_asked_for(train, stopped, whole, tmp_path):
    run = advance(train, tmp_path, resume_at=4)
    assert run.first == 4
    assert run.losses == whole[4:]
    assert [fields["step"] for fields in told(run, "checkpoint_set_aside")] == [6]
    assert len(list(tmp_path.glob("aside-step-00000006*"))) == 1, "not deleted"


def test_the_step_that_is_asked_for_must_be_whole(train, stopped, tmp_path):
    damage(tmp_path, 4)
    with pytest.raises(CheckpointError, match="the checkpoint of step 4 is not whole"):
        advance(train, tmp_path, resume_at=4)
    assert steps(tmp_path) == [2, 4, 6]


def test_going_back_to_the_beginning_sets_everything_aside(train, stopped, whole, tmp_path):
    run = advance(train, tmp_path, resume_at=0)
    assert run.first == 0
    assert run.losses == whole
    assert len(list(tmp_path.glob("aside-*"))) == 3


def test_a_checkpoint_of_another_job_is_refused_unless_it_is_accepted(train, stopped, tmp_path):
    with pytest.raises(InputError, match="it belongs to another job"):
        advance(train, tmp_path, job_hash="1" * 16)
    run = advance(train, tmp_path, job_hash="1" * 16, accepted_before=10**9)
    assert run.first == 6


def test_a_run_does_not_go_on_with_other_data_unless_that_is_accepted(train, tiny, tmp_path):
    data, folder = tmp_path / "rows.jsonl", tmp_path / "c"
    rows = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(rows))
    advance(train, folder, stop_after=4, data={"train": str(data)})
    data.write_text("".join(rows[1:]))
    with pytest.raises(InputError, match="it was trained on other data"):
        advance(train, folder, data={"train": str(data)})
    assert advance(train, folder, data={"train": str(data)}, accepted_before=10**9).first == 4


def test_rows_that_an_earlier_version_read_differently_are_refused_with_what_has_changed(stopped, tmp_path):
    folder = open_storage(tmp_path / "step-00000006")
    manifest = Manifest.read(folder)
    info = replace(
        stopped.info, data_hash="another", data_hash_before=manifest.data_hash, data_changes=("flags", "nested_nulls")
    )
    with pytest.raises(
        InputError, match="read these rows differently; now `train` and `loss` in messages are read; nulls that"
    ):
        _refuse_change(folder, manifest, stopped, info)
    with pytest.raises(InputError, match="puts BOS before plain texts.*data.bos: none goes on with the old tokens"):
        _refuse_change(folder, manifest, stopped, replace(info, data_changes=("bos",)))


def test_other_ends_of_responses_than_those_of_the_run_are_refused(stopped, tmp_path):
    folder = open_storage(tmp_path / "step-00000006")
    manifest = Manifest.read(folder)
    info = replace(stopped.info, stop_tokens=(0, 4), stop_tokens_before=(0,))
    with pytest.raises(InputError, match="responses ended at the tokens 0, now they end at 0, 4: the end of a turn"):
        _refuse_change(folder, manifest, stopped, info)
    _refuse_change(folder, replace(manifest, stop_tokens=[4, 0]), stopped, info)


def test_a_checkpoint_may_have_the_hash_that_an_older_version_gave_the_job(stopped, tmp_path):
    folder = open_storage(tmp_path / "step-00000006")
    manifest = replace(Manifest.read(folder), job_hash="1" * 16)
    with pytest.raises(InputError, match="it belongs to another job"):
        _refuse_change(folder, manifest, stopped, stopped.info)
    stopped.job_hash_before = "1" * 16
    _refuse_change(folder, manifest, stopped, stopped.info)


def test_a_checkpoint_of_a_newer_muster_is_not_passed_over(train, stopped, tmp_path):
    path = tmp_path / "step-00000006" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(NewerFormat, match="a newer Muster"):
        advance(train, tmp_path)
    assert steps(tmp_path) == [2, 4, 6]


def test_workers_that_do_not_share_the_folder_are_found_before_training(train, tmp_path, monkeypatch):
    from training.checkpoint.repository import _InFolder

    monkeypatch.setattr(_InFolder, "staging", property(lambda self: open_storage("/nowhere/runs")))
    with pytest.raises(InputError, match=r"/nowhere/runs cannot be written from .*\n.*all machines share"):
        train(2, checkpoints=tmp_path)
