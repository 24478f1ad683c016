"""What went wrong -> what to do about it. Pure: evidence in, decision out;
knows neither Ray nor processes nor the clock.

Evidence arrives as exceptions, one a worker. `first_cause` finds the one that the others follow from, `decide` judges
it in the light of what has happened before. What is charged to a budget is forgotten once a new checkpoint shows that
the run gets on.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    """What a failure is, by what can be done about it."""

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


# Evidence


class Evidence(MusterError):
    """What is known of a worker that failed."""

    actor_id: str | None = None
    """Of the worker's place, once it has left that."""


class Raised(Evidence):
    """A worker's code raised something that is no message for people. `kind` was decided there (exception_kinds.py)."""

    def __init__(self, name: str, message: str, trace: str, kind: Kind = Kind.PROGRAM):
        super().__init__(name, message, trace, kind)
        self.name, self.message, self.trace, self.kind = name, message, trace, kind


class WorkerDied(Evidence):
    """A worker's process ended. `status`: its exit status, or minus the signal; `reason` if there is more to say.

    `short_of_memory`: the kernel killed processes of its machine for want of memory while it lived.
    """

    def __init__(self, status: int, reason: str = "", short_of_memory: bool = False):
        super().__init__(status, reason, short_of_memory)
        self.status, self.short_of_memory = status, short_of_memory
        self.reason = reason or ("the kernel was short of memory" if short_of_memory else "")


class WorkerError(TrainingError):
    """A failure of one worker: which one and where, what kind, what there is to read."""

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
            lines += ["its traceback ends with:", *_last_lines(self.trace)]
        elif tail := _tail(self.log):
            lines += ["the end of its log:", *tail]
        return "\n".join([*lines, f"whole log: {self.log}"])

    def __reduce__(self) -> Any:
        return _worker_error, (
            self.rank,
            self.kind,
            self.message,
            self.log,
            {"node": self.node, "trace": self.trace, "collateral": self.collateral},
        )


class NoMachines(TrainingError):
    """The machines that a job asks for did not come. The run is well and can be resumed when they are there."""


class RayLost(TrainingError):
    """Processes of a Ray of our own have ended, which the workers need. They are lost with it;
    another Ray can be started."""


def _worker_error(rank: int, kind: Kind, message: str, log: Path, rest: dict[str, Any]) -> WorkerError:
    return WorkerError(rank, kind, message, log, **rest)


def worker_error(rank: int, evidence: Raised | WorkerDied, log: Path, node: str) -> WorkerError:
    """What a worker's evidence says, as a failure of that worker."""
    kind = evidence.kind if isinstance(evidence, Raised) else _kind_of_death(evidence)
    trace = evidence.trace if isinstance(evidence, Raised) else ""
    return WorkerError(rank, kind, describe(evidence), log, node=node, trace=trace)


def describe(evidence: Raised | WorkerDied) -> str:
    """What a process did, behind its name."""
    return f"raised: {evidence.name}: {evidence.message}" if isinstance(evidence, Raised) else _told_death(evidence)


_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)


def _kind_of_death(death: WorkerDied) -> Kind:
    if death.short_of_memory:
        return Kind.MEMORY
    return Kind.CRASH if death.status >= 0 or -death.status in _CRASHES else Kind.KILLED


def _told_death(death: WorkerDied) -> str:
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
"""Of failures at one time, the earlier here the likelier the cause of the others."""


def first_cause(failures: Sequence[MusterError]) -> MusterError:
    """The failure that the others follow from; it names the others as collateral."""
    told = [failure for failure in failures if not isinstance(failure, WorkerError)]
    if told:  # in words for people: the worker knew what it said
        return told[0]
    errors = [failure for failure in failures if isinstance(failure, WorkerError)]
    cause = min(errors, key=lambda error: (_LIKELY_CAUSE.index(error.kind), error.rank))
    others = sorted({error.rank for error in errors} - {cause.rank})
    return WorkerError(
        cause.rank, cause.kind, cause.message, cause.log, node=cause.node, trace=cause.trace, collateral=others
    )


def kind_of(error: MusterError) -> Kind:
    """The kind of a first cause."""
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


# Decisions


@dataclass(frozen=True)
class Incident:
    """One failure of an attempt, as it is remembered. Free of objects: it is written to and read from events.jsonl."""

    kind: Kind
    message: str
    """What was seen, in a line."""
    step: int
    """The step in hand."""
    checkpoint: int
    """Step of the newest checkpoint at that time; 0 if there was none."""
    rank: int | None = None
    node: str | None = None

    def fields(self) -> dict[str, Any]:
        """As an entry of events.jsonl has it."""
        fields = asdict(self)
        return {"class": fields.pop("kind"), **fields}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Incident:
        """From such an entry, which may have more."""
        rest: dict[str, Any] = {name: fields.get(name) for name in ("message", "step", "checkpoint", "rank", "node")}
        return cls(kind=Kind(fields["class"]), **rest)

    @property
    def signature(self) -> tuple[Kind, str, int]:
        """Equal for what is the same failure again, whatever addresses and numbers it names."""
        return self.kind, re.sub(r"0x[0-9a-f]+|\d+", "#", self.message), self.step


@dataclass(frozen=True)
class Decision:
    """What to do after a failure. Without `retry` the run stops."""

    retry: bool
    why: str
    """For the person who reads it."""
    after_s: float = 0.0
    """How long to wait before the next attempt."""
    avoid: frozenset[str] = field(default_factory=frozenset)
    """Nodes that shall not be used."""
    skip: int | None = None
    """A step whose batch is not trained on."""


INFRASTRUCTURE, PROGRAM = "infrastructure", "program"
TRIES = {INFRASTRUCTURE: 8, PROGRAM: 2}
"""Attempts after failures, without a new checkpoint in between."""
_LONGEST_WAIT_S = 60.0
_BAD_NODE = 2
"""Failures that make a node one to avoid."""
_BUDGET = {
    Kind.KILLED: INFRASTRUCTURE,
    Kind.MACHINE: INFRASTRUCTURE,
    Kind.UNFIT: INFRASTRUCTURE,
    Kind.CONNECTION: INFRASTRUCTURE,
    Kind.HANG: INFRASTRUCTURE,
    Kind.STORAGE: INFRASTRUCTURE,
    Kind.CRASH: PROGRAM,
    Kind.MEMORY: PROGRAM,
}
"""What a failure is charged to. Those that are missing are no matter of trying again."""
_NO_USE = {
    Kind.INPUT: "trying again would not change the input",
    Kind.PROGRAM: "an error in the program comes back every time",
    Kind.DIVERGED: "the same batches would diverge again; lower learning_rate, or set on_divergence: skip",
    Kind.SUPERSEDED: "another process has gone on with this run",
}


def decide(incident: Incident, past: Sequence[Incident], *, skip_diverged: bool = False) -> Decision:
    """What to do about a failure, given the earlier ones of this phase, oldest first."""
    avoid = _nodes_to_avoid([*past, incident])
    if incident.kind is Kind.PREEMPTED:
        return Decision(True, "a machine that is taken back is nobody's fault: it is not counted", avoid=avoid)
    if incident.kind is Kind.DIVERGED and skip_diverged:
        return Decision(
            True, f"the batch of step {incident.step} is skipped (on_divergence: skip)", avoid=avoid, skip=incident.step
        )
    if incident.kind is Kind.UNFIT and any((o.kind, o.node) == (Kind.UNFIT, incident.node) for o in past):
        return Decision(False, "there are no other machines in its place; --no-preflight runs on it all the same")
    if incident.kind in _NO_USE:
        return Decision(False, _NO_USE[incident.kind])
    if incident.step > incident.checkpoint and incident.signature in {other.signature for other in past}:
        return Decision(False, f"the same at step {incident.step} as before: not chance, but the program or its data")
    budget = _BUDGET[incident.kind]
    used = sum(_BUDGET.get(other.kind) == budget for other in past if other.checkpoint == incident.checkpoint)
    if used >= TRIES[budget]:
        return Decision(False, f"{used + 1} failures without a new checkpoint in between")
    left = TRIES[budget] - used - 1
    return Decision(
        True,
        f"{left} more {'try' if left == 1 else 'tries'} before the next checkpoint",
        after_s=min(_LONGEST_WAIT_S, 2.0**used) if used else 0.0,
        avoid=avoid,
    )


def _nodes_to_avoid(incidents: Sequence[Incident]) -> frozenset[str]:
    """Those where several things failed, and those that were found unfit."""
    blamed = Counter(incident.node for incident in incidents if incident.node and incident.kind in _BUDGET)
    unfit = {incident.node for incident in incidents if incident.node and incident.kind is Kind.UNFIT}
    return frozenset({node for node, times in blamed.items() if times >= _BAD_NODE} | unfit)


_ADVICE = {
    Kind.MEMORY: (
        "set a smaller micro_tokens (it does not change the curve) or a higher sharding.stage, or take more workers"
    ),
    Kind.CRASH: "the log has where it was; a library or a driver is likely at fault",
    Kind.UNFIT: "the check before the first step found it (`--no-preflight` leaves it out)",
    Kind.KILLED: "somebody or something outside of Muster killed it",
    Kind.HANG: "the stacks of all workers are in the log folder",
    Kind.STORAGE: "look at the room, the network and the credentials of the storage",
}


def told(error: MusterError, incident: Incident, decision: Decision) -> str:
    """One paragraph for the person who watches: who, where, what, what is done, what to change, what it costs."""
    lost = max(0, incident.step - 1 - incident.checkpoint)
    lines = [f"{incident.kind}: {error}"]
    if not decision.retry:
        lines.append(f"not tried again: {decision.why}")
    else:
        wait = f" in {decision.after_s:.0f} s" if decision.after_s else ""
        where = f"from the checkpoint of step {incident.checkpoint}" if incident.checkpoint else "from the beginning"
        lines.append(f"going on{wait} {where} ({lost} {'step' if lost == 1 else 'steps'} to do again); {decision.why}")
    if decision.avoid:
        lines.append(f"avoided from now on: {', '.join(sorted(decision.avoid))}")
    if incident.kind in _ADVICE:
        lines.append(_ADVICE[incident.kind])
    return "\n".join(lines)


def _last_lines(text: str) -> list[str]:
    return [f"  {line}" for line in text.rstrip().splitlines()[-_TAIL_LINES:]]


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            return _last_lines(file.read().decode(errors="replace"))
    except OSError:
        return []
