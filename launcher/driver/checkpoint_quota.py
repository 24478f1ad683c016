"""`checkpoint_quota`: which checkpoints of a run are deleted for it, and which jobs cannot be kept within it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.jobfile.job import Job
from launcher.plan.plan import checkpoint_bytes_of
from launcher.runfolder.run_folder import RunFolder
from training.checkpoint.format import CheckpointError, Manifest, verify
from training.checkpoint.repository import Checkpoints, delete, step_of
from training.errors import InputError
from training.storage import StoragePath

_GB = 1e9


@dataclass(frozen=True)
class Stored:
    """A checkpoint as the quota sees it."""

    folder: StoragePath
    bytes: int
    is_protected: bool
    """It must not be deleted."""


def surplus(stored: Sequence[Stored], quota: int, room: int) -> tuple[list[Stored], int]:
    """Which to delete, of checkpoints with the oldest first, so that `room` more bytes fit;
    and how many bytes are too many all the same."""
    excess = sum(each.bytes for each in stored) + room - quota
    gone = []
    for each in stored:
        if excess > 0 and not each.is_protected:
            gone.append(each)
            excess -= each.bytes
    return gone, max(0, excess)


def make_room(run: RunFolder, job: Job, phase: str, best: StoragePath | None) -> int:
    """Delete the oldest checkpoints of a run that may be deleted, until the next one of `phase` fits into the quota;
    returns how many bytes are too many all the same.

    The newest checkpoint that the phase can be resumed from stays, so do its `best` and the one that each other phase
    has ended with. While the newest is not whole, nothing is deleted. Checkpoints that were set aside do not count.
    """
    assert job.quota_bytes is not None
    checkpoints = Checkpoints(run.checkpoints(phase))
    newest = next(reversed(checkpoints.resumable()), None)
    if newest is not None and verify(newest, deep=False):
        return 0
    room = _bytes(newest) if newest is not None else _planned_bytes(job, phase)
    gone, excess = surplus(list(_stored(run, job, phase, {newest, best})), job.quota_bytes, room)
    for each in gone:
        delete(each.folder)
    return excess


def _stored(run: RunFolder, job: Job, phase: str, kept: set[StoragePath | None]) -> Iterator[Stored]:
    """All checkpoints of a run, in the order of its phases and steps."""
    for name in job.phases:
        folders = Checkpoints(run.checkpoints(name)).folders()
        last = run.chosen_step(name) if name != phase else None
        for folder in folders:
            yield Stored(folder, _bytes(folder), folder in kept or step_of(folder) == last)


def _bytes(folder: StoragePath) -> int:
    try:
        return sum(file.size for file in Manifest.read(folder).files)
    except CheckpointError:
        return 0


def _planned_bytes(job: Job, phase: str) -> int:
    """Of a checkpoint of a phase; 0 if nothing is known of its model yet."""
    try:
        return checkpoint_bytes_of(job.phases[phase])
    except InputError:
        return 0


def check(job: Job) -> None:
    """Raises InputError if two checkpoints of a phase do not fit: one stays while the next is written.
    So does the last of every phase before."""
    if job.quota_bytes is None:
        return
    before, needs = 0, dict[str, int]()
    for name in job.phases:
        size = _planned_bytes(job, name)
        needs[name] = before + 2 * size
        before += size
    name = max(needs, key=lambda each: needs[each])
    if needs[name] > job.quota_bytes:
        earlier = " beside the last of every phase before" if name != next(iter(needs)) else ""
        message = (
            f"{job.checkpoint_quota} has no room for two checkpoints of {name}{earlier}: one stays while the next is "
            f"written, together {needs[name] / _GB:,.2f} GB; raise it (--force runs all the same, and says when the "
            "quota cannot be kept)"
        )
        raise InputError.of(job.document.where(("checkpoint_quota",)), message, "checkpoint_quota")
