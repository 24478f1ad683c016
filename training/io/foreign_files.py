"""Reads files of unknown origin: whatever they contain, their readers raise their own errors with a clear
message."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from training.errors import MusterError

_ODD = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""What code raises that meets a value of another type or size than any that belongs there."""


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for everything that is none, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def made_sense_of(error_of: Callable[[str], Exception]) -> Iterator[None]:
    """In the block a value that does not belong there raises `error_of(what it was)`. Errors of Muster's own pass."""
    try:
        yield
    except MusterError:
        raise
    except _ODD as error:
        raise error_of(f"{type(error).__name__}: {str(error)[:200]}") from error
