"""How long and how often a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets for every benchmark; each uses what applies to it."""

    rounds: int = 3
    """How often each side runs, taking turns."""
    steps: int = 12
    """Steps of a run that are counted."""
    stage: int = 2
    """ZeRO stage."""
    timeout_s: float = 600.0
    """Longest time of one run of one side."""
    only: str | None = None
    """Part of the benchmark to run. None: all of it."""
    types: tuple[str, ...] = ()
    """Model types to look at. Empty: all of them."""
    record: bool = True
    """Whether results are kept."""


class Skipped(Exception):
    """This machine cannot run the benchmark. Says why."""
