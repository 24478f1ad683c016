"""Saves checkpoints of all roles that learn beside their training: workers write,
this process commits when all have written.

One save at a time; the next waits for it. A save that fails is told and tried again; a second failure in a row ends the
run, since from then on everything that is trained could be lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from training.checkpoint.format import CheckpointError, File, Manifest
from training.checkpoint.repository import step_of
from training.config import Phase
from training.drivers.hooks import Hooks
from training.errors import MusterError, SaveError, StorageError, TrainingError
from training.group import Group, results_of
from training.io.versions import MUSTER, versions_of
from training.phase_info import PhaseInfo
from training.storage import StoragePath

SAVE_S = 3600.0
"""Longest time for writing a checkpoint."""
_LAST_S = 60.0
"""The same, of a group that has failed."""


@dataclass(frozen=True)
class _Pending:
    step: int
    staged: StoragePath
    copied: Mapping[str, Mapping[str, Any]]
    """What worker 0 of each role says of the state that it copied."""
    state: Mapping[str, Any]
    began: float
    stall_s: float
    """How long training waited: for the save before, and for the copies."""


class Saver:
    """The checkpoints of one phase, from the first that this attempt makes."""

    def __init__(self, phase: Phase, learners: Mapping[str, Group], hooks: Hooks, info: PhaseInfo, newest: int):
        self.phase, self.learners, self.hooks, self.info = phase, learners, hooks, info
        self.newest = newest
        """Step of the newest checkpoint that is committed or under way."""
        self.failed = False
        """The last save failed: another is due now."""
        self.last_step = info.total_steps
        """Of the phase."""
        self._began_s = hooks.clock()
        """When the newest checkpoint was committed or begun, or training began."""
        self._pending: _Pending | None = None
        self._committed = newest
        """Step of the newest checkpoint that is committed."""
        self._evaluations: dict[int, Mapping[str, float]] = {}
        """By step, until they are written beside their checkpoints: a save may take longer than it is
        to the next evaluation."""

    def is_due(self, step: int) -> bool:
        """Whether to save the state after `step`."""
        return self.hooks.save_requested(step) or self.failed or self.counts(step) or self._is_time(step)

    def _is_time(self, step: int) -> bool:
        return self.due_in_s() <= 0 and not self.is_saving and step != self.newest

    def due_in_s(self) -> float:
        """Seconds until the clock says that another checkpoint is due; infinite if it does not decide."""
        every_s = self.phase.checkpoint.every_s
        return math.inf if every_s is None else self._began_s + every_s - self.hooks.clock()

    def save(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Begin to save the state after `step`. Returns when it is copied.

        `state`: what the driver goes on from beside weights and moments.
        """
        began = time.monotonic()
        self.finish()
        if step == self.newest and not self.failed:
            return
        staged = self.hooks.checkpoints.stage(step)
        self._make_room()
        copied = {role: answers[0] for role, answers in self._all("begin_save", str(staged)).items()}
        self._pending = _Pending(step, staged, copied, state or {}, began, time.monotonic() - began)
        self._began_s = self.hooks.clock()
        self.newest = step

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep what the state after `step` was evaluated as beside its checkpoint, if there is one or will be."""
        if step:
            self._evaluations[step] = metrics
            if self._note():
                self._retain()

    def _note(self) -> bool:
        """Write evaluations beside their checkpoints, once these are committed. A failure is told;
        it is tried again later."""
        due = [step for step in self._evaluations if step <= self._committed]
        if not due:
            return False
        try:
            self.hooks.flush()  # nor may an evaluation that is noted be missing from the curve
            saved = {step_of(folder) for folder in self.hooks.checkpoints.folders()}
            for step in due:
                if step in saved:
                    self.hooks.checkpoints.note(step, self._evaluations[step])
                del self._evaluations[step]
        except (StorageError, OSError) as error:
            self.hooks.event("save_failed", step=due[0], error=f"its evaluation could not be written: {error}")
            return False
        return True

    def end(self, step: int, state: Mapping[str, Any] | None = None) -> StoragePath | None:
        """Save what is not saved yet, and wait. The checkpoint that the phase ends with, if this was its last step."""
        self.save(step, state)
        self.finish()
        if self.failed:  # once more, now that nothing else will come
            self.save(step, state)
            self.finish()
        return self.chosen() if step == self.last_step else None

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    def attend(self, step: int, state: Callable[[], Mapping[str, Any]] = dict) -> None:
        """While the state after `step` is evaluated: as `poll`, and save it when somebody asks
        for it or the clock says so."""
        self.poll()
        if self.hooks.save_requested(step) or self._is_time(step):
            self.save(step, state())

    def poll(self) -> None:
        """Commit the save under way if all workers have written."""
        if self._pending is not None and not any(map(any, self._all("is_saving").values())):
            self.finish()

    def _all(self, method: str, *args: Any, timeout_s: float = SAVE_S) -> dict[str, list[Any]]:
        """The answers of all workers of every role."""
        return results_of(self.learners, method, *args, timeout_s=timeout_s)

    def finish(self, timeout_s: float = SAVE_S) -> None:
        """Wait for the save under way and commit it. Raises the error of a second failure in a row."""
        if (pending := self._pending) is None:
            return
        self._pending = None
        try:
            answers = self._all("finish_save", timeout_s=timeout_s)
            shards = [file for of_role in answers.values() for of_worker in of_role for file in of_worker]
            self.hooks.flush()  # no step of a checkpoint may be missing from the curve
            folder = self.hooks.checkpoints.commit(pending.staged, self._manifest(pending, shards))
        except (SaveError, StorageError, CheckpointError, OSError) as error:
            with suppress(StorageError, OSError):
                pending.staged.remove()
            if self.failed:
                raise
            self.failed = True
            self.hooks.event("save_failed", step=pending.step, error=str(error))
            return
        self.failed = False
        self._committed = pending.step
        self._began_s = self.hooks.clock()
        took, stall = time.monotonic() - pending.began, pending.stall_s
        self.hooks.event(
            "checkpoint", step=pending.step, checkpoint=str(folder), seconds=round(took, 3), stall_s=round(stall, 3)
        )
        self._note()
        self._retain()

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """If the block fails, a save that is under way is still committed where that can be: its state was good."""
        try:
            yield
        except TrainingError:
            with suppress(MusterError, OSError):
                self.finish(timeout_s=_LAST_S)
            raise

    def _retain(self) -> None:
        """Delete what need not stay. A failure is noted; the next checkpoint does it again."""
        settings = self.phase.checkpoint
        counts = self.counts if settings.every_s is None else lambda step: True
        try:
            self.hooks.checkpoints.retain(
                settings.keep, self._best(), keep_weights=settings.keep_weights, counts=counts
            )
        except (StorageError, OSError) as error:
            self.hooks.event("retention_failed", error=str(error))

    def _make_room(self) -> None:
        try:
            self.hooks.make_room(self._best())
        except (StorageError, OSError) as error:
            self.hooks.event("retention_failed", error=str(error))

    def chosen(self) -> StoragePath:
        """The checkpoint that the phase ends with: the best if the job asks for it, else the last."""
        return self._best() or self.hooks.checkpoints.at(self.last_step)

    def _best(self) -> StoragePath | None:
        """None if the job does not ask for the best, or nothing that counts is evaluated yet."""
        best = self.phase.checkpoint.best
        if best is None:
            return None
        return self.hooks.checkpoints.best(best.metric, smaller_is_better=best.smaller_is_better, counts=self.counts)

    def counts(self, step: int) -> bool:
        """Whether the job asks for a checkpoint of this very step: not one made by the clock,
        or because of an interruption."""
        period = self.phase.save_period
        return step == self.last_step or (period is not None and step % period == 0)

    def _manifest(self, pending: _Pending, shards: Sequence[File]) -> Manifest:
        info, phase = self.info, self.phase
        return Manifest(
            phase=phase.recipe,
            step=pending.step,
            samples=min(pending.step * phase.step_samples, info.total_samples),
            optimizer_steps={role: copied["optimizer_step"] for role, copied in pending.copied.items()},
            attempt=self.hooks.checkpoints.attempt,
            world_size=next(iter(self.learners.values())).size,
            zero_stage=phase.sharding.stage,
            dtype=info.dtype,
            chats=info.chats,
            bos=phase.data.bos,
            stop_tokens=list(info.stop_tokens) or None,
            job_hash=self.hooks.job_hash,
            data_hash=info.data_hash,
            parameters={
                name: shape for copied in pending.copied.values() for name, shape in copied["parameters"].items()
            },
            state=dict(pending.state),
            files=list(shards),
            versions=versions_of(("torch", "deepspeed", "transformers", MUSTER)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
