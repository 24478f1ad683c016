"""Checkpoints as files: committed whole or not at all, verified byte by byte, kept and found again."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from training.checkpoint import CheckpointError, Checkpoints, Manifest, Reader, verify, write_shard


def save(root, step, *, world_size=2, metrics=None, attempt=1):
    """A checkpoint of one parameter `w` [4, 5] that holds 0..19 plus the step, written by `world_size` workers."""
    checkpoints = Checkpoints(root, attempt=attempt)
    values = np.arange(20, dtype=np.float32) + step
    cuts = [20 * rank // world_size for rank in range(world_size + 1)]
    staged = checkpoints.stage(step)
    files = [
        write_shard(
            staged / f"worker-{rank}.safetensors",
            [(f"fp32/w@{a}", values[a:b]), (f"exp_avg/w@{a}", -values[a:b])],
        )
        for rank, (a, b) in enumerate(pairwise(cuts))
    ]
    manifest = Manifest(
        phase="sft", step=step, samples=step * 8, optimizer_step=step, attempt=attempt, world_size=world_size,
        zero_stage=2, dtype="float32", formats={}, job_hash="j", data_hash="d", metrics=metrics or {},
        parameters={"w": [4, 5]}, files=files, versions={}, created="2026-01-01",
    )  # fmt: skip
    return checkpoints.commit(staged, manifest)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_stretch_is_read_whoever_wrote_it(tmp_path, world_size):
    reader = Reader(save(tmp_path, 5, world_size=world_size))
    expected = np.arange(20, dtype=np.float32) + 5
    for start in range(20):
        for stop in range(start + 1, 21):
            out = np.empty(stop - start, dtype=np.float32)
            reader.read("exp_avg", "w", start, out)
            assert np.array_equal(out, -expected[start:stop])
    assert np.array_equal(reader.whole("w"), expected.reshape(4, 5))


def test_a_shard_is_a_safetensors_file_that_other_tools_read(tmp_path):
    from safetensors.numpy import load_file

    folder = save(tmp_path, 1)
    assert load_file(folder / "worker-0.safetensors")["fp32/w@0"].tolist() == list(range(1, 11))


def test_what_is_not_there_is_an_error_not_garbage(tmp_path):
    reader = Reader(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="10 of 20 elements"):
        reader.read("fp32", "w", 10, np.empty(20, dtype=np.float32))
    with pytest.raises(CheckpointError, match="0 of 1 elements"):
        reader.read("fp32", "unknown", 0, np.empty(1, dtype=np.float32))


def test_shards_without_a_manifest_are_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    leftover = tmp_path / ".tmp-step-00000003.attempt-1"  # as a process leaves it that is killed while it saves
    leftover.mkdir()
    write_shard(leftover / "worker-0.safetensors", [])
    assert checkpoints.folders() == []
    assert checkpoints.newest_whole() == (None, [])
    checkpoints.sweep()
    assert list(tmp_path.iterdir()) == []


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": (lambda folder: _flip_a_bit(folder / "worker-1.safetensors"), "has changed since it was written"),
    "truncated": (lambda f: (f / "worker-0.safetensors").write_bytes(b"12345"), "5 bytes, .* were written"),
    "deleted": (lambda folder: (folder / "worker-0.safetensors").unlink(), "missing"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:99]), "not a readable"),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
    "of the future": (lambda f: (f / "manifest.json").write_text(json.dumps({"format": 99})), "newer Muster"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_is_used(tmp_path, damage):
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    harm, message = DAMAGES[damage]
    harm(newer)
    found, findings = Checkpoints(tmp_path).newest_whole()
    assert found == older
    assert findings == verify(newer)
    assert re.search(message, findings[0])


def test_a_swapped_shard_of_another_step_is_found(tmp_path):
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    (newer / "worker-0.safetensors").write_bytes((older / "worker-0.safetensors").read_bytes())
    assert "has changed" in verify(newer)[0]


def test_quick_verification_reads_no_content(tmp_path):
    folder = save(tmp_path, 1)
    _flip_a_bit(folder / "worker-1.safetensors")
    assert verify(folder, deep=False) == []
    assert len(verify(folder)) == 1


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 1.5)]:
        save(tmp_path, step, metrics={"eval_loss": loss})
    gone = Checkpoints(tmp_path).retain(2, best="eval_loss")
    assert [folder.name for folder in gone] == ["step-00000001", "step-00000003"]
    assert [folder.name[-1] for folder in Checkpoints(tmp_path).folders()] == ["2", "4", "5"]


def test_best_may_be_the_largest(tmp_path):
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7)]:
        save(tmp_path, step, metrics={"eval_accuracy": accuracy})
    best = Checkpoints(tmp_path).best("eval_accuracy", smaller_is_better=False)
    assert best.name == "step-00000002"


def test_a_step_can_be_saved_again_by_a_later_attempt(tmp_path):
    save(tmp_path, 7, attempt=1)
    folder = save(tmp_path, 7, attempt=2, world_size=3)
    assert Manifest.read(folder).attempt == 2
    assert verify(folder) == []
    assert len(list(tmp_path.iterdir())) == 1


def test_a_step_that_does_not_exist_lists_those_that_do(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 9)
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; there are: 5, 9"):
        Checkpoints(tmp_path).at(6)


def test_a_shard_that_another_machine_keeps_to_itself_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    manifest = Manifest.read(save(tmp_path / "elsewhere", 4))
    with pytest.raises(CheckpointError, match="worker-0.safetensors: missing; `storage` must be"):
        checkpoints.commit(checkpoints.stage(4), manifest)
    assert checkpoints.folders() == []


def test_what_resuming_passed_over_does_not_count_when_old_checkpoints_are_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (200, 300, 400):
        folder = save(tmp_path, step)
        if step > 200:
            _flip_a_bit(folder / "worker-1.safetensors")
    found, _ = checkpoints.newest_whole()
    checkpoints.set_aside(after=200)
    save(tmp_path, 230)
    checkpoints.retain(2)
    assert found.name == "step-00000200"
    assert [folder.name[-3:] for folder in checkpoints.folders()] == ["200", "230"]
    assert checkpoints.newest_whole()[0].name == "step-00000230"


def test_a_disk_that_cannot_be_read_counts_as_damage(tmp_path, monkeypatch):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / "worker-0.safetensors").unlink()
    (newer / "worker-0.safetensors").mkdir()
    assert Checkpoints(tmp_path).newest_whole()[0] == older
