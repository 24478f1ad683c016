"""A folder and a bucket answer alike, and a bucket that fails for a while is tried again."""

from __future__ import annotations

import os
import time

import pytest

from training import storage
from training.errors import InputError, StorageError
from training.storage import download, open_storage, upload


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    return (
        open_storage(tmp_path) if request.param == "folder" else open_storage(request.getfixturevalue("s3").url + "/a")
    )


@pytest.fixture
def bucket(s3):
    return open_storage(s3.url + "/a", patience_s=20)


def test_what_is_written_is_read_and_may_be_replaced(root):
    (root / "x").write(b"one")
    (root / "x").write(b"second")
    assert (root / "x").read() == b"second"
    assert root.read_ranges([("x", 1, 3), ("x", 3, 6)]) == [b"ec", b"ond"]


def test_what_is_not_there_is_told(root):
    with pytest.raises(FileNotFoundError):
        (root / "x").read()
    with pytest.raises(FileNotFoundError):
        root.read_ranges([("x", 0, 1)])
    assert (root / "nothing").children() == {}
    (root / "nothing").remove()


def test_children_are_files_with_their_size_and_folders(root):
    if not storage.is_remote(str(root)):
        (root / "deep").path.mkdir()
    (root / "file").write(b"12345")
    (root / "deep/inside").write(b"1")
    assert root.children() == {"file": 5, "deep": None}
    (root / "deep").remove()
    (root / "file").remove()
    assert root.children() == {}


def put(s3, key: str, data: bytes) -> None:
    """An object whose name the client of this project would not write."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.put_object(Bucket=s3.url.removeprefix("s3://"), Key=key, Body=data)


@pytest.mark.parametrize("name", ["../../../.bashrc", "./x", "/x", "sub/../../x", "a\\b"])
def test_names_in_a_bucket_that_lead_out_of_a_folder_are_refused(s3, tmp_path, name):
    put(s3, f"a/model/{name}", b"echo hello")
    put(s3, "a/model/config.json", b"{}")
    with pytest.raises(StorageError, match="which cannot be the name of a file; remove it"):
        download(open_storage(s3.url + "/a/model"), tmp_path / "deep/er/copy")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "config.json"]


def test_objects_that_mark_a_folder_are_no_files(s3, tmp_path):
    for key in ("a/model/", "a/model/sub/"):
        put(s3, key, b"")
    put(s3, "a/model/x", b"12")
    assert open_storage(s3.url + "/a/model").children() == {"x": 2, "sub": None}
    download(open_storage(s3.url + "/a/model"), tmp_path / "copy")
    assert (tmp_path / "copy/x").read_bytes() == b"12"


def test_of_several_that_create_a_file_one_succeeds(root):
    assert (root / "x").create(b"mine")
    assert not (root / "x").create(b"another's")
    assert (root / "x").read() == b"mine"


def test_large_files_are_written_from_blocks(root, monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 5 << 20)
    blocks = [bytes([number]) * (3 << 20) for number in range(5)]
    (root / "x").write_blocks([memoryview(block) for block in blocks])
    assert root.children() == {"x": 15 << 20}
    assert (root / "x").read() == b"".join(blocks)


def test_folders_are_copied_there_and_back(root, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (source / name).write_text(name)
    (source / "empty").touch()
    if not storage.is_remote(str(root)):
        (root / "copy/deep").path.mkdir(parents=True)
    upload(source, root / "copy")
    download(root / "copy", tmp_path / "back")
    assert {
        str(p.relative_to(tmp_path / "back")): p.read_text() for p in (tmp_path / "back").rglob("*") if p.is_file()
    } == {
        "a": "a",
        "deep/b": "deep/b",
        "empty": "",
    }


def test_why_a_folder_cannot_be_written(tmp_path, s3):
    assert storage.why_not_writable(open_storage(tmp_path), "me") is None
    assert storage.why_not_writable(open_storage(s3.url + "/x"), "me") is None
    assert "No such file or directory" in storage.why_not_writable(open_storage(tmp_path / "no"), "me")
    assert "does not exist" in storage.why_not_writable(open_storage("s3://no-such-bucket/x", patience_s=5), "me")


def test_storage_that_is_not_installed_or_unknown_is_wrong_input():
    with pytest.raises(InputError, match="gs:// cannot be used .*pip install 'muster-train\\[gcs\\]'"):
        open_storage("gs://bucket/x")
    with pytest.raises(InputError, match="no-such:// cannot be used .*use a folder, s3:// or gs://"):
        open_storage("no-such://bucket/x")


# A bucket that fails for a while


def test_refusals_are_tried_again(s3, bucket):
    s3.faults.fail_next(16, method="PUT")  # more than the client itself tries
    (bucket / "x").write(b"1")
    assert len(s3.faults.requests) == 17
    s3.faults.fail_next(3, method="GET")
    assert (bucket / "x").read() == b"1"
    s3.faults.fail_next(3, method="GET")
    assert bucket.children() == {"x": 1}


def test_an_upload_that_is_cut_is_begun_again(s3, bucket, monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 5 << 20)
    data = bytes(range(256)) * (48 << 10)
    s3.faults.cut_after(2 << 20, times=6, method="PUT")
    (bucket / "x").write_blocks([memoryview(data)[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20)])
    assert (bucket / "x").read() == data


def test_a_download_that_is_cut_is_begun_again(s3, bucket):
    data = bytes(range(256)) * (16 << 10)
    (bucket / "x").write(data)
    s3.faults.cut_after(1 << 20, times=6, method="GET")
    assert bucket.read_ranges([("x", 0, len(data)), ("x", 5, 9)]) == [data, data[5:9]]


def test_a_file_is_created_once_though_the_answer_was_lost(s3, bucket):
    s3.faults.lose_answer(1, method="PUT", key_contains="claim")
    assert (bucket / "claim").create(b"mine")
    assert (bucket / "claim").read() == b"mine"


def test_an_outage_is_waited_for(s3, bucket):
    (bucket / "x").write(b"1")
    s3.faults.down(4)
    began = time.monotonic()
    assert (bucket / "x").read() == b"1"
    assert time.monotonic() - began > 3


def test_patience_ends(s3):
    impatient = open_storage(s3.url + "/a", patience_s=1)
    with s3.faults.unreachable(), pytest.raises(StorageError, match="the storage does not answer"):
        impatient.children()


@pytest.mark.timeout(120)  # where it is waited for, an hour is waited
def test_what_waiting_does_not_mend_is_told_at_once():
    with pytest.raises(FileNotFoundError):
        open_storage("s3://no-such-bucket/x", patience_s=3600).write(b"1")
