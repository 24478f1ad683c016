"""Values that all workers must share, compared by three workers; and no collective of theirs
that unpickles what it is sent."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.fork_group import ForkGroup

ROOT = Path(__file__).parents[3]
PICKLED = {
    f"{name}_object{end}"
    for name, end in (
        ("all_gather", ""),
        ("gather", ""),
        ("broadcast", "_list"),
        ("scatter", "_list"),
        ("send", "_list"),
        ("recv", "_list"),
    )
}


@pytest.fixture(scope="module")
def group():
    with ForkGroup(3, "tests.support.roles:Probe") as group:
        yield group


def found_by_all(group, *values):
    everyone = [future.result(60) for future in group.map("differences", values)]
    assert everyone.count(everyone[0]) == 3
    return everyone[0]


@pytest.mark.cpu
def test_workers_that_agree_have_nothing_to_say(group):
    assert found_by_all(group, *[{"training data": "a" * 5000, "held-out data": ""}] * 3) == []


@pytest.mark.cpu
def test_the_values_that_differ_are_named_with_the_workers(group):
    same, odd = (
        {"precision": "bf16", "attention": "sdpa", "data": ""},
        {"precision": "bf16", "attention": "eager", "data": "x"},
    )
    assert found_by_all(group, same, odd, odd) == [
        "attention of workers 1, 2: eager, of worker 0: sdpa",
        "data of workers 1, 2: x, of worker 0: none",
    ]


@pytest.mark.cpu
def test_long_values_that_differ_at_their_end_differ(group):
    assert len(found_by_all(group, {"code": "a" * 5000}, {"code": "a" * 5000}, {"code": "a" * 4999 + "b"})) == 1


def test_no_code_of_ours_calls_a_collective_that_unpickles():
    for file in (file for package in ("training", "launcher") for file in (ROOT / package).rglob("*.py")):
        called = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not called & PICKLED, file
