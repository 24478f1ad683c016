"""What a run offers to a recipe's driver. Implemented by launcher/phase_run.py, and by tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from training.checkpoint import Checkpoints
from training.facts import Facts


class Hooks(Protocol):
    """One phase of a run."""

    checkpoints: Checkpoints
    job_hash: str

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics."""
        ...

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened, for the record and the terminal."""
        ...

    def started(self, facts: Facts, step: int) -> None:
        """Training begins, `step` steps are done already."""
        ...

    def stop_requested(self) -> bool:
        """Whether to save and return at the next opportunity."""
        ...
