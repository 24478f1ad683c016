"""Finding sources and streaming their rows."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import Source
from training.data import files
from training.data.files import DataFile, HubSplit, RowError, digest, expand, rows
from training.errors import InputError

ROWS = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n), "note": 'quote " bracket ] é 😀'} for n in range(600)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: str, base: Path) -> list[files.Row]:
    return [row for source in expand(path, base) for part in source.parts for row in rows(part)]


def only_error(found: list[files.Row]) -> tuple[str, str]:
    (row,) = [row for row in found if isinstance(row.value, RowError)]
    return row.where, str(row.value)


def problem(data, base: Path) -> str:
    with pytest.raises(InputError) as caught:
        expand(data, base)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES + "\n\n"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.json", LINES),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.jsonl", "\ufeff" + LINES),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    write(tmp_path / name, content)
    found = read(name, tmp_path)
    assert [row.value for row in found] == ROWS
    assert found[41].where == f"{name}:42"


def test_parquet_gives_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=100)
    found = read("a.parquet", tmp_path)
    assert [row.value for row in found] == ROWS
    assert [row.number for row in found] == list(range(1, 601))


def test_line_numbers_count_blank_lines(tmp_path):
    write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in read("a.jsonl", tmp_path)] == ["a.jsonl:1", "a.jsonl:3"]


def test_a_path_outside_the_job_folder_is_shown_in_full(tmp_path):
    outside = write(tmp_path / "data/a.jsonl", LINES)
    (tmp_path / "job").mkdir()
    (source,) = expand("../data/a.jsonl", tmp_path / "job")
    assert source.parts[0].shown == str(outside)
    assert expand(str(outside), tmp_path)[0].parts[0].shown == "data/a.jsonl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "broken JSON"),
        (b"[1, 2]", "expected an object of columns, got a list"),
        (b"3", "got a number (3)"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 0xff)"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path, line, message):
    write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    found = read("a.jsonl", tmp_path)
    where, error = only_error(found)
    assert (where, len(found)) == ("a.jsonl:2", 3)
    assert message in error


def test_a_truncated_gzip_ends_with_a_bad_row(tmp_path):
    write(tmp_path / "a.jsonl.gz", gzip.compress(LINES.encode())[:-200])
    found = read("a.jsonl.gz", tmp_path)
    assert "the file is truncated" in only_error(found)[1]
    assert isinstance(found[-1].value, RowError)
    assert [row.value for row in found[:-1]] == ROWS[: len(found) - 1]


def test_a_gz_that_is_none_is_a_bad_row(tmp_path):
    write(tmp_path / "a.jsonl.gz", LINES)
    assert "Not a gzipped file" in only_error(read("a.jsonl.gz", tmp_path))[1]


def test_a_broken_parquet_is_a_bad_row(tmp_path):
    write(tmp_path / "a.parquet", b"PAR1 and no more")
    assert "broken Parquet" in only_error(read("a.parquet", tmp_path))[1]


@pytest.mark.parametrize(
    ("text", "good", "message"),
    [
        ('[{"a": 1}, {"a": 2}', 2, "the file ends inside the array"),
        ('[{"a": 1}, {"a": "tw', 1, "Unterminated string"),
        ('[{"a": 1}, {"a" 2}, {"a": 3}' + " " * 100 + "]", 1, "Expecting ':'"),
        ('[{"a": 1} {"a": 2}]', 1, "expected ','"),
        ('[{"a": 1}] [', 1, "nothing may follow"),
        ('[{"a": 1}, 7]', 1, "expected an object"),
    ],
)
def test_a_broken_array_keeps_the_rows_before_the_break(tmp_path, text, good, message):
    write(tmp_path / "a.json", text)
    found = read("a.json", tmp_path)
    assert sum(isinstance(row.value, dict) for row in found) == good
    assert message in only_error(found)[1]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=5), st.booleans())
def test_an_array_may_be_torn_anywhere_between_two_reads(array, ascii_only):
    text = json.dumps(array, ensure_ascii=True if not _encodable(array) else ascii_only)
    for chunk in (1, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "ARRAY_CHUNK", chunk)
            stream = io.BufferedReader(cast(Any, io.BytesIO(text.encode())))
            assert [value for _, value in files._json_array(stream)] == array


def _encodable(array) -> bool:
    try:
        json.dumps(array, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = json.dumps({"prompt": "p" * 80, "completion": "c" * 80})
    count = 60_000
    text = "[" + ",\n".join([row] * count) + "]" if name == "a.json" else (row + "\n") * count
    write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    del text
    (source,) = expand(name, tmp_path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows(source.parts[0])) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6  # the file has 11 million characters


def test_a_folder_and_a_glob_give_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.json", "c.parquet.tmp", "README.md", ".hidden.jsonl", "deep/d.jsonl"):
        write(tmp_path / "data" / name, LINES)
    assert [part.shown for part in expand("data", tmp_path)[0].parts] == ["data/a.json", "data/b.jsonl"]
    assert [part.shown for part in expand("data/*", tmp_path)[0].parts] == ["data/a.json", "data/b.jsonl"]
    assert [part.shown for part in expand("data/**/*.jsonl", tmp_path)[0].parts] == [
        "data/b.jsonl",
        "data/deep/d.jsonl",
    ]


def test_a_list_keeps_its_order_and_weights(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "b.jsonl", LINES)
    located = expand([Source(path="b.jsonl", weight=3), Source(path="a.jsonl", weight=1)], tmp_path)
    assert [(each.parts[0].shown, each.source.weight) for each in located] == [("b.jsonl", 3), ("a.jsonl", 1)]


def test_some_weights_without_the_others_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    assert "without one: a.jsonl" in problem(["a.jsonl", Source(path="a.jsonl", weight=1)], tmp_path)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    write(tmp_path / "data/train.jsonl", LINES)
    write(tmp_path / "data/empty.jsonl", "")
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "table.xyz", "a,b")
    named = ["data/trian.jsonl", "data/empty.jsonl", "nothing", "data/*.json", "table.xyz", "nowhere/a.jsonl"]
    with pytest.raises(InputError) as caught:
        expand(named, tmp_path, where="job.yaml:7", what="phases.sft.data.train")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "job.yaml:7: phases.sft.data.train[0]: data/trian.jsonl: no such file or folder; did you mean data/train.jsonl?"
    )
    expected = [
        "did you mean",
        "is empty",
        "folder holds no data file",
        "glob holds no data file",
        "cannot tell the kind",
    ]
    assert all(part in line for part, line in zip([*expected, "nor the folder"], lines, strict=True))


def test_a_file_without_permission_is_told(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", LINES)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission to read the file" in problem("a.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["./owner/name", "owner/name.jsonl", "owner/name.csv", "/owner/name", "name", "a/b/c"])
def test_what_looks_like_a_path_is_not_a_hub_name(tmp_path, name):
    assert "no such file or folder" in problem(name, tmp_path)


def test_a_hub_name_is_read_with_the_datasets_library(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (source,) = expand([Source(path="openai/gsm8k", name="main", split="test")], tmp_path)
    found = list(rows(source.parts[0]))
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert [row.value for row in found] == ROWS
    assert found[2].where == "openai/gsm8k[main]:test:3"


def test_a_hub_that_does_not_answer_is_an_input_error(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(InputError, match=r"no such file or folder, and the Hugging Face hub .* offline"):
        list(rows(HubSplit("owner/absent", None, "train")))


def test_any_fsspec_address_is_read(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", LINES.encode())
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(LINES.encode()))
    memory.pipe("/bucket/empty.jsonl", b"")
    (source,) = expand("memory://bucket/[ab].*", tmp_path)
    assert [part.shown for part in source.parts] == ["memory:///bucket/a.jsonl", "memory:///bucket/b.jsonl.gz"]
    assert [row.value for part in source.parts for row in rows(part)] == ROWS + ROWS
    assert "empty.jsonl is empty" in problem("memory://bucket", tmp_path)
    assert "no such file" in problem("memory://bucket/absent.jsonl", tmp_path)
    before = digest(source.parts[0], tmp_path)
    assert digest(source.parts[0], tmp_path) == before
    memory.pipe("/bucket/a.jsonl", LINES.encode() * 2)
    assert digest(source.parts[0], tmp_path) != before


def test_a_digest_follows_the_content_at_once(tmp_path):
    path, memo = write(tmp_path / "a.jsonl", "aaaa"), tmp_path / "memo"
    part = DataFile(str(path), "a.jsonl")
    before, stat = digest(part, memo), path.stat()
    write(path, "bbbb")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if within one tick of the clock
    assert digest(part, memo) != before
    write(path, "aaaa")
    assert digest(part, memo) == before


def test_the_digest_of_an_old_file_is_remembered(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", LINES)
    os.utime(path, (1e9, 1e9))
    part, memo = DataFile(str(path), "a.jsonl"), tmp_path / "memo"
    before = digest(part, memo)
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    assert digest(part, memo) == before


def test_reading_loads_no_torch():
    code = (
        "import sys, training.data.files, training.data.formats, training.data.prepare; print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


# ── documents ──


def test_text_files_are_documents_where_those_are_wanted(tmp_path):
    write(tmp_path / "b.md", "# two\nlines\n")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "c.jsonl", '{"text": "three"}\n')
    (source,) = files.expand(str(tmp_path), tmp_path, documents=True)
    found = [row for part in source.parts for row in files.rows(part)]
    assert [(row.where, row.value) for row in found] == [
        ("a.txt:1", {"text": "one"}), ("b.md:1", {"text": "# two\nlines\n"}), ("c.jsonl:1", {"text": "three"}),
    ]  # fmt: skip
    (without,) = files.expand(str(tmp_path), tmp_path)
    assert [part.shown for part in without.parts] == ["c.jsonl"]


def test_a_large_text_file_is_several_documents_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 20)
    text = "".join(f"line {number}\n" for number in range(20))
    write(tmp_path / "a.txt", text)
    (source,) = files.expand("a.txt", tmp_path, documents=True)
    found = [row.value["text"] for row in files.rows(source.parts[0])]
    assert "".join(found) == text
    assert len(found) > 5
    assert all(document.endswith("\n") for document in found)


def test_a_text_file_that_is_not_utf8_is_a_bad_row(tmp_path):
    write(tmp_path / "a.txt", b"caf\xe9")
    (source,) = files.expand("a.txt", tmp_path, documents=True)
    assert "not UTF-8" in str(next(iter(files.rows(source.parts[0]))).value)


# ── tables ──


def test_csv_gives_texts_whatever_they_look_like(tmp_path):
    text = '\ufeffprompt,completion,note\r\n"1, ""one""\nand 2",007,\r\n\r\nnan,1e5,"[1, 2]"\r\n'
    write(tmp_path / "a.csv", text)
    write(tmp_path / "b.csv.gz", gzip.compress(text.encode()))
    expected = [
        {"prompt": '1, "one"\nand 2', "completion": "007", "note": ""},
        {"prompt": "nan", "completion": "1e5", "note": "[1, 2]"},
    ]
    for name in ("a.csv", "b.csv.gz"):
        found = read(name, tmp_path)
        assert [row.value for row in found] == expected
        assert [row.number for row in found] == [2, 5]


def test_tsv_is_separated_by_tabs(tmp_path):
    write(tmp_path / "a.tsv", "prompt\tcompletion\na, b\t c\n")
    assert [row.value for row in read("a.tsv", tmp_path)] == [{"prompt": "a, b", "completion": " c"}]


def test_messages_in_a_cell_are_read_as_messages(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    import csv

    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "note"], [json.dumps(turns), json.dumps({"role": 1})[:-1]]])
    assert [row.value for row in read("a.csv", tmp_path)] == [{"messages": turns, "note": '{"role": 1'}]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        (
            "a,b\n1,2\n1,2,3\n1,2\n",
            "t.csv:3",
            "expected 2 fields as in the header, got 3; quote fields that contain commas",
        ),
        ("a,b\n1,2\n\n1\n1,2\n", "t.csv:4", "expected 2 fields as in the header, got 1"),
        ('a,b\n1,2\n"x" y,2\n1,2\n', "t.csv:3", "broken CSV"),
        (b"a,b\n1,2\n\xff,2\n1,2\n", "t.csv:3", "not UTF-8"),
    ],
)
def test_a_bad_row_of_csv_is_one_bad_row(tmp_path, text, where, message):
    write(tmp_path / "t.csv", text)
    found = read("t.csv", tmp_path)
    assert len(found) == 3
    got_where, got = only_error(found)
    assert got_where == where
    assert message in got
    assert not isinstance(found[1].value, files.UnreadableFile)


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a;b\n1;2\n", "t.csv:1", "the fields seem to be separated by semicolons, and are read as separated by commas"),
        ("a,a\n1,2\n", "t.csv:1", "the header names a column twice: a"),
        ("a,b\n1,2\n3,\"4\n5,6\n", "t.csv:3", "a quote that opens in this row is never closed"),
        ("a,b\r1,2\r", "t.csv:1", "carriage return alone"),
        ("a,b\n1,2\n".encode("utf-16"), "t.csv:1", "UTF-16"),
    ],
)  # fmt: skip
def test_a_csv_file_that_cannot_be_read_on_ends_there(tmp_path, text, where, message):
    write(tmp_path / "t.csv", text)
    found = read("t.csv", tmp_path)
    got_where, got = only_error(found)
    assert got_where == where
    assert message in got
    assert isinstance(found[-1].value, files.UnreadableFile)


def test_memory_does_not_grow_with_a_csv_file(tmp_path):
    write(tmp_path / "a.csv", "prompt,completion\n" + "x" * 99 + "," + "y" * 100 + "\n")
    with (tmp_path / "a.csv").open("ab") as file:
        file.write((b"x" * 99 + b"," + b"y" * 100 + b"\n") * 50_000)
    tracemalloc.start()
    assert sum(1 for _ in read_lazily("a.csv", tmp_path)) == 50_001
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def read_lazily(name, base):
    (source,) = expand(name, base)
    return (row for part in source.parts for row in rows(part))


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_arrow_gives_the_same_rows(tmp_path, writer, name):
    table = pa.Table.from_pylist(ROWS)
    with writer(str(tmp_path / name), table.schema) as file:
        file.write_table(table, max_chunksize=400)
    found = read(name, tmp_path)
    assert [row.value for row in found] == ROWS
    assert found[41].where == f"{name}:42"
    content = (tmp_path / name).read_bytes()
    write(tmp_path / name, content[: len(content) // 2])
    _, message = only_error(read(name, tmp_path))
    assert message.startswith("broken Arrow")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders that the library wrote: `one`, in two shards, and `dict` with the splits train and test."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_list(ROWS[:10]).select(range(9, -1, -1))
    one.save_to_disk(str(folder / "one"), num_shards=2)
    splits = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:5])}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "dict"))
    return folder


def values(source, base: Path, **settings) -> list:
    return [row.value for one in expand(source, base, **settings) for part in one.parts for row in rows(part)]


def test_a_folder_of_save_to_disk_gives_its_rows_in_order(saved):
    assert values("one", saved) == ROWS[9::-1]
    assert values(saved.as_uri() + "/one", saved) == ROWS[9::-1]
    assert expand("one", saved)[0].parts[0].kind == "Arrow"


def test_a_split_of_a_saved_dictionary_is_chosen(saved):
    assert values("dict", saved) == values([Source(path="dict", split="train")], saved) == ROWS[:3]
    assert values([Source(path="dict", split="test")], saved, split="") == values("dict/test", saved) == ROWS[3:5]
    assert values([Source(path=saved.as_uri() + "/dict", split="test")], saved) == ROWS[3:5]


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("dict", {"split": ""}, "the folder has several splits; there are train, test: name one, `{path:"),
        ([Source(path="dict", split="val")], {}, "the folder has no split `val`; there are train, test"),
        ([Source(path="one", split="test")], {}, "the folder holds one data set without splits, not `test`"),
    ],
)
def test_a_split_that_is_not_there_is_told(saved, source, settings, message):
    with pytest.raises(InputError) as caught:
        expand(source, saved, **settings)
    assert message in str(caught.value)


def test_a_saved_folder_that_is_not_whole_is_told(saved, tmp_path):
    import shutil

    shutil.copytree(saved / "one", tmp_path / "lost")
    next(iter(sorted((tmp_path / "lost").glob("*.arrow")))).unlink()
    assert "written by save_to_disk, and data-00000-of-00002.arrow is not there" in problem("lost", tmp_path)
    shutil.copytree(saved / "one", tmp_path / "torn")
    (tmp_path / "torn/state.json").write_text("{")
    assert "state.json cannot be read" in problem("torn", tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.xlsx", "cannot read an Excel workbook; save the sheet as CSV"),
        ("a.pkl", "a pickle, which can run code"),
        ("a.zip", "an archive; unpack it"),
        ("a.tar.gz", "an archive; unpack it"),
        ("a.jsonl.zst", "packed by Zstandard"),
        ("a.txt", "cannot tell the kind of file; known are"),
        ("a.parquet.gz", "cannot tell the kind of file"),
    ],
)
def test_other_kinds_of_files_are_told_what_to_do_with(tmp_path, name, advice):
    write(tmp_path / name, "x")
    assert advice in problem(name, tmp_path)
