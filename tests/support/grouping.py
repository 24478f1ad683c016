"""Which tests stay in one process, in order, when processes of pytest-xdist run side by side;
and which of these groups start first."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id

TESTS = Path(__file__).parents[1]
SHARED = {"ray_cluster": "ray", "muster_here": "clusters on this machine", "growing": "clusters on this machine"}
"""Fixtures too expensive for every process, or that take fixed resources of this machine,
and the group of their tests."""
TRAINING = "training"
"""Tests that train on several processes of their own. Side by side they would only slow each other down."""
LONGEST = (TRAINING, "curves")
"""Groups of more than two minutes, the longest first: one of them must not be what all others wait for at the end."""


def group_of(item: pytest.Item) -> str:
    """A mark of its own, else what it shares with other files, else its file: fixtures of a module are built once."""
    if (mark := item.get_closest_marker("xdist_group")) is not None:
        return str(mark.args[0])
    if item.get_closest_marker("cpu") is not None and TESTS / "training" in item.path.parents:
        return TRAINING
    names = getattr(item, "fixturenames", ())
    return next((SHARED[name] for name in names if name in SHARED), item.path.relative_to(TESTS).as_posix())


def _turn(item: pytest.Item) -> tuple[int, bool]:
    """The longest groups first, then what starts processes, then the unit tests."""
    group = group_of(item)
    turn = LONGEST.index(group) if group in LONGEST else len(LONGEST)
    return turn, not any(item.get_closest_marker(name) for name in ("cluster", "cpu", "faults"))


def arrange(items: list[pytest.Item]) -> None:
    """Write its group into every test's id, where the scheduler reads it,
    and put the groups in the order in which they start."""
    items.sort(key=_turn)
    for item in items:
        # pytest-xdist 3.8 does this for the mark `xdist_group`, but to an attribute that pytest 9.2 no longer has.
        item._id = coerce_node_id(f"{item.nodeid}@{group_of(item)}")
