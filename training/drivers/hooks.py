"""What a run offers to a recipe's driver. Implemented by launcher/driver/phase_run.py, and by tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from training.checkpoint.repository import OpenCheckpoints
from training.phase_info import PhaseInfo
from training.storage import StoragePath


class Hooks(Protocol):
    """One phase of a run."""

    checkpoints: OpenCheckpoints
    job_hash: str
    job_hash_before: str
    """The hash that an older version gave the job; checkpoints may have it."""
    resume_at: int | None
    """Step of the checkpoint to go on from, 0 for the beginning; None for the newest whole one."""
    accepted_before: int
    """Checkpoints of attempts before this one may be of another job
    or other data: the user wants to go on with them."""

    profiles: StoragePath
    """Folder of what profiled steps leave."""

    skipped: frozenset[int]
    """Steps whose batches are not trained on, because the loss diverged there."""

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics."""
        ...

    def answers(self, step: int, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Generated responses of an evaluation; `kind` is part of a name, empty for answers to questions."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A few responses that were learnt from, for people."""
        ...

    def paces(self, seconds_a_token: Sequence[float]) -> None:
        """How fast each worker computed of late, in rank order; 0: not known."""
        ...

    def gpus_full(self, fractions: Sequence[float]) -> None:
        """How much of the memory of its GPU each worker has taken at most, in rank order; 0 without a GPU."""
        ...

    def event(self, kind: str, **info: Any) -> None:
        """Something that happened, for the record and the terminal."""
        ...

    def flush(self) -> None:
        """Make sure that what was logged is kept where the checkpoints are. Raises StorageError or OSError."""
        ...

    def started(self, info: PhaseInfo, step: int, *, evaluates: bool = False) -> None:
        """Training begins, `step` steps are done already. `evaluates`: the evaluation of the last
        of them is done (again) now."""
        ...

    def make_room(self, best: StoragePath | None) -> None:
        """Delete older checkpoints of the run, but not `best`, until its quota has room for another.
        Raises StorageError or OSError."""
        ...

    def save_requested(self, step: int) -> bool:
        """Whether somebody has asked for a checkpoint now; asked once,
        and answered that the state after `step` will be saved."""
        ...

    def clock(self) -> float:
        """Seconds, of a clock that only goes forward: when `checkpoint.every` is a time, it decides when to save."""
        ...

    def stop_requested(self) -> bool:
        """Whether to save and return at the next opportunity."""
        ...


def note_damage(infos: Sequence[PhaseInfo], hooks: Hooks) -> None:
    """An event for everything that workers have found damaged. `infos`: of all workers, in rank order."""
    for rank, info in enumerate(infos):
        for finding in info.data_damage:
            hooks.event("data_damaged", finding=finding, rank=rank)
