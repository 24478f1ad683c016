"""One checkpoint as files: read by whoever needs a part of it,
and not a byte given out that is not as it was written."""

import json
import re

import numpy as np
import pytest

from tests.support.made_checkpoints import SIZE, save_in, values_of
from training.checkpoint import format as checkpoint
from training.checkpoint.format import CheckpointError, Manifest, NewerFormat, Reader, verify, write_shard
from training.storage import Local


@pytest.fixture(params=[4 << 20, 16], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_stretch_is_read_whoever_wrote_it(tmp_path, world_size):
    reader = Reader(save_in(tmp_path, 5, world_size=world_size))
    for start in range(SIZE):
        for stop in range(start + 1, SIZE + 1):
            out = np.empty(stop - start, dtype=np.float32)
            reader.read("exp_avg", "w", start, out)
            assert np.array_equal(out, -values_of(5)[start:stop])
    assert np.array_equal(reader.whole("w"), values_of(5).reshape(4, 5))


def test_a_shard_is_a_safetensors_file_that_other_tools_read(tmp_path):
    from safetensors.numpy import load_file

    folder = save_in(tmp_path, 1)
    assert load_file(folder.path / "worker-0.safetensors")["fp32/w@0"].tolist() == list(range(1, 11))


def test_a_shard_of_nothing_is_a_file_too(tmp_path):
    file = write_shard(Local(tmp_path / "empty"), [], np.empty(0, np.float32))
    assert file.size == file.header == (tmp_path / "empty").stat().st_size


def test_what_is_not_there_is_an_error_not_garbage(tmp_path):
    reader = Reader(save_in(tmp_path, 1))
    with pytest.raises(CheckpointError, match="10 of 20 elements"):
        reader.read("fp32", "w", 10, np.empty(20, dtype=np.float32))
    with pytest.raises(CheckpointError, match="0 of 1 elements"):
        reader.read("fp32", "unknown", 0, np.empty(1, dtype=np.float32))


def flip_a_bit(path, byte=-3):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def _edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rename_a_shard(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    _edit_manifest(folder, files=manifest["files"])


DAMAGES = {
    "a bit": (lambda folder: flip_a_bit(folder / "worker-1.safetensors"), "has changed since it was written"),
    "a bit of a header": (lambda f: flip_a_bit(f / "worker-1.safetensors", 100), "the header has changed"),
    "truncated": (lambda f: (f / "worker-0.safetensors").write_bytes(b"12345"), "5 bytes, .* were written"),
    "deleted": (lambda folder: (folder / "worker-0.safetensors").unlink(), "missing"),
    "a folder instead": (
        lambda f: ((f / "worker-0.safetensors").unlink(), (f / "worker-0.safetensors").mkdir()),
        "missing",
    ),
    "manifest cut": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:99]),
        "not a readable",
    ),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
    "outside": (
        lambda folder: _rename_a_shard(folder, "../x/worker-0.safetensors"),
        "worker-0.safetensors' is no name of a shard",
    ),
    "of the past": (lambda folder: _edit_manifest(folder, format=1), "written by an older Muster"),
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_by_verifying_and_by_reading(tmp_path, damage):
    folder = save_in(tmp_path, 20)
    harm, message = DAMAGES[damage]
    harm(folder.path)
    (finding,) = verify(folder)
    assert re.search(message, finding)
    with pytest.raises(CheckpointError, match=message):
        _read_all(folder)


def _read_all(folder):
    reader = Reader(folder)
    for kind in ("fp32", "exp_avg"):
        reader.read(kind, "w", 0, np.empty(SIZE, np.float32))


def test_a_shard_of_another_step_is_found(tmp_path):
    older, newer = save_in(tmp_path, 10), save_in(tmp_path, 20)
    (newer.path / "worker-0.safetensors").write_bytes((older.path / "worker-0.safetensors").read_bytes())
    assert "has changed" in verify(newer)[0]
    with pytest.raises(CheckpointError, match="has changed"):
        _read_all(newer)


@pytest.mark.usefixtures("blocks")
def test_every_single_bit_of_a_shard_is_under_a_checksum(tmp_path):
    folder = save_in(tmp_path, 1)
    path = folder.path / "worker-0.safetensors"
    for byte in range(path.stat().st_size):
        flip_a_bit(path, byte)
        assert len(verify(folder)) == 1, f"byte {byte}"
        flip_a_bit(path, byte)
    assert verify(folder) == []


def test_a_part_that_is_well_is_read_from_a_file_that_is_damaged_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 16)
    folder = save_in(tmp_path, 1, world_size=1)
    flip_a_bit(folder.path / "worker-0.safetensors")
    out = np.empty(4, np.float32)
    Reader(folder).read("fp32", "w", 0, out)
    assert np.array_equal(out, values_of(1)[:4])


def test_a_checkpoint_of_a_newer_muster_is_not_taken_for_damage(tmp_path):
    folder = save_in(tmp_path, 20)
    _edit_manifest(folder.path, format=99, something="new")
    with pytest.raises(NewerFormat, match=r"a newer Muster \(format 99\); this one reads 3"):
        verify(folder)


def test_quick_verification_reads_no_content(tmp_path):
    folder = save_in(tmp_path, 1)
    flip_a_bit(folder.path / "worker-1.safetensors")
    assert verify(folder, deep=False) == []
    assert len(verify(folder)) == 1


def test_evaluations_of_older_versions_have_the_current_names(tmp_path):
    folder = save_in(tmp_path, 7, metrics={"eval_accuracy": 0.25, "eval_ended": 0.5})
    assert Manifest.read(folder).metrics == {"eval_accuracy": 0.25, "eval_eos_rate": 0.5}


def test_the_manifest_comes_back_as_it_was_written(tmp_path):
    folder = save_in(tmp_path, 7, metrics={"eval_loss": 1 / 3})
    manifest = Manifest.read(folder)
    assert manifest.metrics == {"eval_loss": 1 / 3}
    assert manifest.dumped() == (folder / "manifest.json").read()
