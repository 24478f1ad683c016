"""Documents as somebody might write them who wants a parser to fail: valid ones with one value replaced."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DEEP = "<deep>"
"""Stands for a value that is nested too deeply to be written by `json.dumps`."""
_DEEP_TEXT = "[" * 5_000 + "]" * 5_000
VALUES: list[Any] = [
    float("inf"), float("-inf"), float("nan"), 1e308, 10**13, 2**62, 2**63, 10**400, -1, 0, 0.5, True, None, "", "x",
    "../../x", "/etc/shadow",
    "\x1b[2J", "\ud800", "9" * 5000, [], {}, [[]], [None], ["x"], [float("inf")], [10**13], [-1], [2**62, 2**62],
    {"x": 1}, {"": {}}, DEEP,
]  # fmt: skip
bounded = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
"""The same examples each time, a few seconds a test."""
few = settings(bounded, max_examples=25)
"""For parsers that take their time."""


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where values stand in a document, the document itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def spoilt(document: Any) -> st.SearchStrategy[Any]:
    """The document with one value replaced, or a key more."""
    return st.builds(
        lambda path, value: _replaced(document, path, value),
        st.sampled_from(list(paths(document))),
        st.sampled_from(VALUES),
    )


def _replaced(document: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    whole = copy.deepcopy(document)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return whole


def text_of(document: Any) -> str:
    """As JSON, which YAML contains."""
    return json.dumps(document).replace(json.dumps(DEEP), _DEEP_TEXT)
