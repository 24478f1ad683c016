"""YAML 1.2 scalars, line numbers, and what broken files are told."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.jobfile import yaml_with_lines
from training.errors import InputError

SCALARS = {
    "1e-5": 1e-5,
    "1E5": 1e5,
    "2.": 2.0,
    ".5": 0.5,
    "+3": 3,
    "-0": 0,
    "012": 12,
    "0o17": 15,
    "0x1F": 31,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "no": "no",
    "on": "on",
    "yes": "yes",
    "y": "y",
    "1_000": "1_000",
    "0b1": "0b1",
    "12:30": "12:30",
    "2026-01-31": "2026-01-31",
    "1e": "1e",
    "'12'": "12",
    "[1, no]": [1, "no"],
    "{a: 1e3}": {"a": 1000.0},
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    got = yaml_with_lines.parse(f"key: {text}\n", "job.yaml").data["key"]
    assert (got, type(got)) == (value, type(value))


def test_not_a_number_is_a_number():
    assert math.isnan(yaml_with_lines.parse_value(".nan"))


def test_every_key_and_item_has_its_line():
    document = yaml_with_lines.parse("a: 1\n\nb:\n  - x\n  - c:\n      {d: 2,\n       e: 3}\n", "job.yaml")
    assert document.lines == {
        ("a",): 1,
        ("b",): 3,
        ("b", 0): 4,
        ("b", 1): 5,
        ("b", 1, "c"): 5,
        ("b", 1, "c", "d"): 6,
        ("b", 1, "c", "e"): 7,
    }
    assert document.where(("b", 1, "c", "missing")) == "job.yaml:5"
    assert document.where(("nowhere",)) == "job.yaml"


def test_anchors_and_merge_keys_work_and_own_keys_win():
    text = "base: &base {x: 1, y: 2}\none: {<<: *base, y: 3}\ntwo: {<<: [*base, {z: 4}]}\nthree: *base\n"
    data = yaml_with_lines.parse(text, "job.yaml").data
    assert data["one"] == {"x": 1, "y": 3}
    assert data["two"] == {"x": 1, "y": 2, "z": 4}
    assert data["three"] == {"x": 1, "y": 2}


def test_a_merged_key_that_is_overridden_has_the_line_of_the_override():
    text = "base: &base\n  data:\n    train: x\none:\n  <<: *base\n  data:\n    eval: y\n"
    document = yaml_with_lines.parse(text, "job.yaml")
    assert document.lines[("one", "data")] == 6
    assert ("one", "data", "train") not in document.lines


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "": ["job.yaml: the file is empty"],
    "# only a comment\n": ["job.yaml: the file is empty"],
    "- a\n": ["job.yaml:1: expected `key: value` lines, got a list"],
    "hello\n": ["job.yaml:1: expected `key: value` lines, got text"],
    "a: 1\nb: 2\na: 3\nb: 4\n": [
        "job.yaml:3: a: this key is given twice, first in line 1; keep one",
        "job.yaml:4: b: this key is given twice, first in line 2; keep one",
    ],
    "a: {x: 1}\nb: {c: 1, c: 2}\n": ["job.yaml:2: b.c: this key is given twice, first in line 2; keep one"],
    "a: &a {x: 1, x: 2}\nb: *a\n": ["job.yaml:1: a.x: this key is given twice, first in line 1; keep one"],
    "a:\n  5: x\n": ['job.yaml:2: a: a key must be text, got a number; write "5" in quotes'],
    "a:\n  [x]: 1\n": ["job.yaml:2: a: a key must be text, got a list"],
    "a:\n\tb: 1\n": ["job.yaml:2: not valid YAML: a tab in the indentation; YAML is indented with spaces"],
    "a: 1\nb\nc: 2\n": [
        "job.yaml:2: not valid YAML: this line has no `: ` between key and value "
        "(could not find expected ':', while scanning a simple key)"
    ],
    "a: 1\nb: 'x\nc: 2\n": [
        "job.yaml:2: not valid YAML: a quote is opened here and never closed "
        "(found unexpected end of stream, while scanning a quoted scalar)"
    ],
    "a: b: c\n": [
        "job.yaml:1: not valid YAML: a second `: ` in this line, or a line that is indented too deep "
        "(mapping values are not allowed here)"
    ],
    "a: &x [1, *x]\n": ["job.yaml:1: a.1: contains itself through an alias"],
    "a: &x {<<: *x}\n": ["job.yaml:1: a.<<: contains itself through an alias"],
    "<<: 5\n": ["job.yaml:1: not valid YAML: expected a mapping or list of mappings for merging, but found scalar"],
    "a: !!binary aGk=\nb: !mine 5\n": [
        "job.yaml:1: a: the tag !!binary is not supported; leave it out",
        "job.yaml:2: b: the tag !mine is not supported; leave it out",
    ],
    "a: " + "9" * 5000: [f"job.yaml:1: a: {'9' * 37}... cannot be read as a number"],
    "a: " + "[" * 5000: ["job.yaml: the values are nested too deeply to be read"],
    "a: 1\nb: \x07\n": ["job.yaml:2: the control character 0x07 is not allowed in YAML"],
    BOMB: ["job.yaml:1: its aliases (`*name`) expand to more than 100,000 values"],
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_cannot_be_read_is_told_with_its_line(text):
    with pytest.raises(InputError) as caught:
        yaml_with_lines.parse(text, "job.yaml")
    assert str(caught.value).splitlines() == REFUSED[text]


def test_files_that_cannot_be_opened_or_decoded(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    for file, message in ((latin, "latin.yaml:2: byte 0xe9 is not UTF-8 text"), (tmp_path / "x.yaml", "no such file")):
        with pytest.raises(InputError, match=message):
            yaml_with_lines.load(file)
    with pytest.raises(InputError, match="is a folder"):
        yaml_with_lines.load(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfname: x\r\nseed: 1\r\n")
    assert yaml_with_lines.load(tmp_path / "bom.yaml").data == {"name": "x", "seed": 1}


@settings(max_examples=200, deadline=None)
@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")))
def test_what_is_dumped_reads_back_equal(value):
    back = yaml_with_lines.parse(yaml_with_lines.dump({"key": value, "list": [value]}), "job.yaml").data
    assert back == {"key": value, "list": [value]}
    assert type(back["key"]) is type(value)


@pytest.mark.parametrize("text", [*SCALARS, "- a", "a: b", "#", "<<", "=", "1e5", "0o7"])
def test_text_that_looks_like_something_else_stays_text(text):
    assert yaml_with_lines.parse(yaml_with_lines.dump({"key": text}), "job.yaml").data == {"key": text}
