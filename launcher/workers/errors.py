"""Exceptions for failures of workers, and the choice of the failure that caused the others. Uses neither Ray nor
processes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from training.errors import (
    Diverged,
    InputError,
    MusterError,
    SaveError,
    ServiceError,
    StorageError,
    Superseded,
    TrainingError,
)

_TAIL_LINES = 15


class Kind(StrEnum):
    """The kind of a failure; it determines what can be done about it."""

    INPUT = "wrong input"
    PROGRAM = "error in the program"
    DIVERGED = "diverged"
    MEMORY = "out of memory"
    CRASH = "crashed"
    KILLED = "killed"
    MACHINE = "lost machine"
    UNFIT = "unfit machine"
    PREEMPTED = "machine taken back"
    CONNECTION = "lost connection"
    HANG = "hang"
    STORAGE = "storage"
    SUPERSEDED = "superseded"


class Evidence(MusterError):
    """Base class of what is known about a failed worker."""

    actor_id: str | None = None
    """The id of the worker's actor; set when the error leaves the actor."""


class Raised(Evidence):
    """Code of a worker raised an unexpected exception. The worker determined `kind` (exception_kinds.py)."""

    def __init__(self, name: str, message: str, trace: str, kind: Kind = Kind.PROGRAM):
        super().__init__(name, message, trace, kind)
        self.name, self.message, self.trace, self.kind = name, message, trace, kind


class WorkerDied(Evidence):
    """A worker's process ended. `status`: its exit status, or the negated signal number; `reason`: details, if any.

    `short_of_memory`: the kernel's OOM killer killed processes on the machine while the worker ran.
    """

    def __init__(self, status: int, reason: str = "", short_of_memory: bool = False):
        super().__init__(status, reason, short_of_memory)
        self.status, self.short_of_memory = status, short_of_memory
        self.reason = reason or ("the kernel ran out of memory" if short_of_memory else "")


class WorkerError(TrainingError):
    """The failure of one worker: its rank and machine, the kind of failure, and its log."""

    def __init__(
        self, rank: int, kind: Kind, message: str, log: Path, *, node: str = "", trace: str = "",
        collateral: Sequence[int] = ()
    ):  # fmt: skip
        super().__init__(message)
        self.rank, self.kind, self.log, self.node, self.trace = rank, kind, log, node, trace
        self.collateral = tuple(collateral)

    def __str__(self) -> str:
        where = f" on {self.node}" if self.node else ""
        lines = [f"worker {self.rank}{where} {self.message}"]
        if self.collateral:
            lines.append(f"workers {', '.join(map(str, self.collateral))} failed because of it")
        if self.trace:
            lines += ["end of its traceback:", *_last_lines(self.trace)]
        elif tail := _tail(self.log):
            lines += ["end of its log:", *tail]
        return "\n".join([*lines, f"full log: {self.log}"])

    def __reduce__(self) -> Any:
        return _worker_error, (
            self.rank,
            self.kind,
            self.message,
            self.log,
            {"node": self.node, "trace": self.trace, "collateral": self.collateral},
        )


class NoMachines(TrainingError):
    """The machines that a job needs did not become available. The run is intact and can be resumed later."""


class RayLost(TrainingError):
    """Processes of Muster's own Ray instance ended, and the workers with them. Another instance can be started."""


def _worker_error(rank: int, kind: Kind, message: str, log: Path, rest: dict[str, Any]) -> WorkerError:
    return WorkerError(rank, kind, message, log, **rest)


def worker_error(rank: int, evidence: Raised | WorkerDied, log: Path, node: str) -> WorkerError:
    """Turn evidence about a worker into an error that names the worker."""
    kind = evidence.kind if isinstance(evidence, Raised) else _kind_of_death(evidence)
    trace = evidence.trace if isinstance(evidence, Raised) else ""
    return WorkerError(rank, kind, describe(evidence), log, node=node, trace=trace)


def describe(evidence: Raised | WorkerDied) -> str:
    """Describe what a process did, as the predicate of a sentence that begins with its name."""
    return f"raised: {evidence.name}: {evidence.message}" if isinstance(evidence, Raised) else _describe_death(evidence)


_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)


def _kind_of_death(death: WorkerDied) -> Kind:
    if death.short_of_memory:
        return Kind.MEMORY
    return Kind.CRASH if death.status >= 0 or -death.status in _CRASHES else Kind.KILLED


def _describe_death(death: WorkerDied) -> str:
    how = (
        f"ended with status {death.status}"
        if death.status >= 0
        else f"was killed by {signal.Signals(-death.status).name}"
    )
    return f"{how}: {death.reason}" if death.reason else how


_LIKELY_CAUSE = (
    Kind.UNFIT,
    Kind.MACHINE,
    Kind.MEMORY,
    Kind.CRASH,
    Kind.KILLED,
    Kind.PROGRAM,
    Kind.HANG,
    Kind.CONNECTION,
)
"""Kinds of simultaneous failures, the most likely cause first."""


def first_cause(failures: Sequence[MusterError]) -> MusterError:
    """Return the failure that caused the others; it lists them as collateral."""
    expected = [failure for failure in failures if not isinstance(failure, WorkerError)]
    if expected:  # these have messages for the user and name the cause themselves
        return expected[0]
    errors = [failure for failure in failures if isinstance(failure, WorkerError)]
    cause = min(errors, key=lambda error: (_LIKELY_CAUSE.index(error.kind), error.rank))
    others = sorted({error.rank for error in errors} - {cause.rank})
    return WorkerError(
        cause.rank, cause.kind, cause.message, cause.log, node=cause.node, trace=cause.trace, collateral=others
    )


def kind_of(error: MusterError) -> Kind:
    """Return the kind of a failure that `first_cause` has returned."""
    kinds: dict[type[MusterError], Kind] = {
        InputError: Kind.INPUT,
        Diverged: Kind.DIVERGED,
        SaveError: Kind.STORAGE,
        StorageError: Kind.STORAGE,
        ServiceError: Kind.CONNECTION,
        Superseded: Kind.SUPERSEDED,
        RayLost: Kind.MACHINE,
    }
    if isinstance(error, WorkerError):
        return error.kind
    return next((kind for type_, kind in kinds.items() if isinstance(error, type_)), Kind.PROGRAM)


def _last_lines(text: str) -> list[str]:
    return [f"  {line}" for line in text.rstrip().splitlines()[-_TAIL_LINES:]]


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            return _last_lines(file.read().decode(errors="replace"))
    except OSError:
        return []
