"""The checkpoints of a phase: committed whole or not at all, by the newest attempt alone, kept and found again."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.made_checkpoints import save, save_in, staged, values_of
from tests.training.checkpoint.test_format import flip_a_bit
from training.checkpoint.format import OPTIMIZER, CheckpointError, Manifest, Reader, verify, write_shard
from training.checkpoint.repository import Checkpoints, opened, step_of
from training.errors import StorageError, Superseded
from training.storage import Local, open_storage


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    """Where checkpoints are kept."""
    return (
        open_storage(tmp_path)
        if request.param == "folder"
        else open_storage(request.getfixturevalue("s3").url + "/runs/a")
    )


def steps(root):
    return [step_of(folder) for folder in Checkpoints(root).folders()]


def leftovers(root):
    """What lies beside the checkpoints, apart from the attempts' own marks."""
    return [name for name in root.children() if not name.startswith(("step-", ".attempt"))]


def test_shards_without_a_commit_are_no_checkpoint_and_go_when_the_next_attempt_opens(root):
    staged(opened(root, 1), 3)
    assert steps(root) == []
    assert Checkpoints(root).newest_whole() == (None, [])
    opened(root, 2).close()
    assert not [name for name in root.children() if name.startswith("step-")]
    assert leftovers(root) == []


def test_a_commit_is_found_whole(root):
    checkpoints = opened(root, 1)
    folder = save(checkpoints, 10)
    assert steps(root) == [10]
    assert verify(folder) == []
    assert Checkpoints(root).newest_whole() == (folder, [])


def test_a_damaged_one_is_passed_over_and_told(root):
    checkpoints = opened(root, 1)
    older, newer = save(checkpoints, 10), save(checkpoints, 20)
    shard = newer / Manifest.read(newer).files[0].name
    shard.write(shard.read()[:-1])
    found, findings = Checkpoints(root).newest_whole()
    assert found == older
    assert findings == verify(newer)
    assert len(findings) == 1


def test_a_shard_that_is_not_there_cannot_be_committed(root):
    checkpoints = opened(root, 1)
    folder, manifest = staged(checkpoints, 4)
    (folder / "worker-0.safetensors").remove()
    with pytest.raises(CheckpointError, match=r"worker-0.safetensors: missing"):
        checkpoints.commit(folder, manifest)
    assert steps(root) == []


def test_an_older_attempt_can_neither_stage_nor_commit(root):
    old = opened(root, 1)
    save(old, 10)
    before = staged(old, 20)
    new = opened(root, 2)
    with pytest.raises(Superseded, match="this is attempt 1"):
        old.commit(*before)
    with pytest.raises(Superseded):
        old.stage(30)
    assert steps(root) == [10], "what was committed before the later attempt opened is there"
    new.close()
    with pytest.raises(Superseded):
        old.stage(30)


def test_an_older_attempt_does_not_replace_what_a_later_one_has_committed(root):
    old = opened(root, 1)
    before = staged(old, 20)
    save(opened(root, 2), 20, world_size=3)
    with pytest.raises(Superseded):
        old.commit(*before)
    (folder,) = Checkpoints(root).folders()
    assert (Manifest.read(folder).attempt, Manifest.read(folder).world_size) == (2, 3)
    assert verify(folder) == []


def test_an_older_attempt_cannot_open_and_one_attempt_only_once(root):
    opened(root, 2)
    with pytest.raises(Superseded, match="attempt 2 has taken over; this is attempt 1"):
        opened(root, 1)
    with pytest.raises(Superseded, match="attempt 2 is being worked on by another process"):
        opened(root, 2)


def test_a_step_can_be_saved_again(root):
    checkpoints = opened(root, 1)
    save(checkpoints, 7)
    folder = save(checkpoints, 7, world_size=3)
    assert Manifest.read(folder).world_size == 3
    assert verify(folder) == []
    assert steps(root) == [7]


def test_the_newest_and_the_best_are_kept(root):
    checkpoints = opened(root, 1)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 1.5)]:
        save(checkpoints, step, metrics={"eval_loss": loss})
    gone = checkpoints.retain(2, checkpoints.best("eval_loss"))
    assert [step_of(folder) for folder in gone] == [1, 3]
    assert steps(root) == [2, 4, 5]
    assert leftovers(root) == []


def test_best_may_be_the_largest(root):
    checkpoints = opened(root, 1)
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7)]:
        save(checkpoints, step, metrics={"eval_accuracy": accuracy})
    assert step_of(checkpoints.best("eval_accuracy", smaller_is_better=False)) == 2


def test_a_checkpoint_made_because_of_an_interruption_goes_when_a_newer_one_is_there(root):
    checkpoints = opened(root, 1)
    for step in (10, 20, 23):
        save(checkpoints, step)
    checkpoints.retain(2, counts=lambda step: step % 10 == 0)
    assert steps(root) == [10, 20, 23], "it is the newest"
    save(checkpoints, 30)
    checkpoints.retain(2, counts=lambda step: step % 10 == 0)
    assert steps(root) == [20, 30]


def optimizer_shards(folder):
    prefixes = ["", *[name for name, size in folder.children().items() if size is None]]
    inside = [name for prefix in prefixes for name in (folder / prefix if prefix else folder).children()]
    return [name for name in inside if name.endswith(OPTIMIZER)]


def test_older_ones_keep_their_weights_alone_and_the_best_does_too(root):
    checkpoints = opened(root, 1)
    for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.0)]:
        save(checkpoints, step, metrics={"eval_loss": loss})
        checkpoints.retain(2, checkpoints.best("eval_loss"), keep_weights=2)
    assert steps(root) == [1, 3, 4, 5, 6]
    assert [step_of(folder) for folder in checkpoints.resumable()] == [5, 6]
    for folder in checkpoints.folders()[:3]:
        assert (verify(folder), optimizer_shards(folder), Manifest.read(folder).weights_only) == ([], [], True)
        reader = Reader(folder)
        assert reader.whole("w").ravel().tolist() == values_of(step_of(folder)).tolist()
        with pytest.raises(CheckpointError, match="exp_avg of w: 0 of 20 elements"):
            reader.read("exp_avg", "w", 0, np.empty(20, np.float32))
    assert Manifest.read(checkpoints.at(1)).metrics == {"eval_loss": 1.0}


def test_a_thinning_that_was_cut_short_leaves_a_sound_checkpoint_and_the_rest_goes_later(root):
    checkpoints = opened(root, 1)
    folder = save(checkpoints, 1)
    names = [file.name for file in Manifest.read(folder).files if file.name.endswith(OPTIMIZER)]
    shards = {name: (folder / name).read() for name in names}
    checkpoints.drop_optimizer(folder)
    for name, content in shards.items():  # as it is between the new manifest and the deletion
        (folder / name).write(content)
    assert (verify(folder), len(optimizer_shards(folder))) == ([], 2)
    opened(root, 2)
    assert (verify(folder), optimizer_shards(folder)) == ([], [])


def test_an_older_attempt_thins_nothing(root):
    old = opened(root, 1)
    folder = save(old, 1)
    opened(root, 2)
    with pytest.raises(Superseded):
        old.drop_optimizer(folder)
    assert not Manifest.read(folder).weights_only


def test_a_checkpoint_of_an_older_version_whose_shards_hold_both_stays_whole(root):
    checkpoints = opened(root, 1)
    staging, manifest = staged(checkpoints, 1)
    layout = [("fp32/w@0", 20), ("exp_avg/w@0", 20)]
    both = write_shard(staging / "worker.safetensors", layout, np.concatenate([values_of(1), -values_of(1)]))
    checkpoints.commit(staging, replace(manifest, files=[both]))
    save(checkpoints, 2)
    checkpoints.retain(1, keep_weights=1)
    assert [step_of(folder) for folder in checkpoints.resumable()] == [1, 2]
    assert verify(checkpoints.at(1)) == []


def test_nothing_is_deleted_while_the_newest_is_not_whole(root):
    checkpoints = opened(root, 1)
    for step in (10, 20):
        save(checkpoints, step)
    newest = checkpoints.at(20)
    (newest / Manifest.read(newest).files[0].name).remove()
    assert checkpoints.retain(1) == []
    assert steps(root) == [10, 20]


def test_what_is_set_aside_does_not_count_and_is_not_deleted(root):
    checkpoints = opened(root, 1)
    for step in (200, 300):
        save(checkpoints, step)
    checkpoints.set_aside(checkpoints.at(300))
    assert steps(root) == [200]
    save(checkpoints, 300)
    assert steps(root) == [200, 300]
    assert verify(checkpoints.at(300)) == []
    opened(root, 2)
    assert _files_of_set_aside(root) >= 2


def _files_of_set_aside(root):
    if isinstance(root, Local):
        (aside,) = root.path.glob("aside-step-00000300*")
        return len(list(aside.glob("worker-*")))
    return sum(name.startswith("worker-") for name in (root / "step-00000300" / "attempt-1").children())


def test_a_step_that_does_not_exist_lists_those_that_do(root):
    checkpoints = opened(root, 1)
    save(checkpoints, 5)
    save(checkpoints, 9)
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; there are: 5, 9"):
        checkpoints.at(6)


def test_a_disk_that_cannot_be_read_counts_as_damage(tmp_path):
    older, newer = save_in(tmp_path, 1), save_in(tmp_path, 2)
    (newer.path / "worker-0.safetensors").unlink()
    (newer.path / "worker-0.safetensors").mkdir()
    assert Checkpoints(open_storage(tmp_path)).newest_whole()[0] == older


def test_an_ended_attempt_leaves_nothing_but_its_checkpoints(tmp_path):
    folder = save_in(tmp_path, 1)
    flip_a_bit(folder.path / "worker-1.safetensors")
    save_in(tmp_path, 2, attempt=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_storage_that_is_away_is_no_later_attempt(tmp_path):
    checkpoints = opened(open_storage(tmp_path / "storage"), 1)
    (tmp_path / "storage").rename(tmp_path / "away")
    with pytest.raises(StorageError, match="is not there: is its storage mounted"):
        checkpoints.stage(1)
    (tmp_path / "away").rename(tmp_path / "storage")
    checkpoints.stage(1)
