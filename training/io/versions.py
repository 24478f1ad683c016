"""Versions of the packages that can affect a result."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from training import __version__

MUSTER = "muster-train"
"""Of the distribution. Its code may be here without it: it travels with a job to machines
that have the dependencies alone."""


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Of those that are here, by name of the distribution."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = __version__ if name == MUSTER else version(name)
    return found
