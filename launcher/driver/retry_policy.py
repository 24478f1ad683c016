"""Decides what to do after a failure. Pure: no Ray, no processes, no clock.

`decide` takes an incident and the earlier ones. Failures count against a retry budget, which a new checkpoint resets,
because it shows that the run makes progress.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.workers.errors import Kind
from training.errors import MusterError


@dataclass(frozen=True)
class Incident:
    """One failure of an attempt. It holds plain values only, since it is written to and read from events.jsonl."""

    kind: Kind
    message: str
    """The error in one line."""
    step: int
    """The step in progress."""
    checkpoint: int
    """Step of the newest checkpoint at that time; 0 if there was none."""
    rank: int | None = None
    node: str | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of an entry of events.jsonl."""
        fields = asdict(self)
        return {"class": fields.pop("kind"), **fields}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Incident:
        """Build an incident from such an entry, which may have more fields."""
        rest: dict[str, Any] = {name: fields.get(name) for name in ("message", "step", "checkpoint", "rank", "node")}
        return cls(kind=Kind(fields["class"]), **rest)

    @property
    def signature(self) -> tuple[Kind, str, int]:
        """A key that is equal for repetitions of the same failure; addresses and numbers in the message are ignored."""
        return self.kind, re.sub(r"0x[0-9a-f]+|\d+", "#", self.message), self.step


@dataclass(frozen=True)
class Decision:
    """What to do after a failure. Without `retry` the run stops."""

    retry: bool
    why: str
    """The reason, for the user."""
    after_s: float = 0.0
    """How long to wait before the next attempt."""
    avoid: frozenset[str] = field(default_factory=frozenset)
    """Nodes that must not be used."""
    skip: int | None = None
    """A step whose batch is skipped."""


INFRASTRUCTURE, PROGRAM = "infrastructure", "program"


TRIES = {INFRASTRUCTURE: 8, PROGRAM: 2}
"""Retries allowed without a new checkpoint in between."""


_LONGEST_WAIT_S = 60.0


_BAD_NODE = 2
"""Number of failures after which a node is avoided."""


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
"""The budget that a failure counts against. Kinds that are missing are never retried for a budget."""


_NO_USE = {
    Kind.INPUT: "retrying does not change the input",
    Kind.PROGRAM: "a program error recurs on every attempt",
    Kind.DIVERGED: "the same batches would diverge again; lower learning_rate, or set on_divergence: skip",
    Kind.SUPERSEDED: "another process has resumed this run",
}


def decide(incident: Incident, past: Sequence[Incident], *, skip_diverged: bool = False) -> Decision:
    """Decide what to do after a failure, given the earlier ones of this phase, oldest first."""
    avoid = _nodes_to_avoid([*past, incident])
    if incident.kind is Kind.PREEMPTED:
        return Decision(True, "a preemption does not count against the retry budget", avoid=avoid)
    if incident.kind is Kind.DIVERGED and skip_diverged:
        return Decision(
            True, f"skipping the batch of step {incident.step} (on_divergence: skip)", avoid=avoid, skip=incident.step
        )
    if incident.kind is Kind.UNFIT and any((o.kind, o.node) == (Kind.UNFIT, incident.node) for o in past):
        return Decision(False, "there are no other machines to replace it; --no-preflight uses it anyway")
    if incident.kind in _NO_USE:
        return Decision(False, _NO_USE[incident.kind])
    if incident.step > incident.checkpoint and incident.signature in {other.signature for other in past}:
        return Decision(
            False, f"the same failure recurred at step {incident.step}; the cause is the program or its data"
        )
    budget = _BUDGET[incident.kind]
    used = sum(_BUDGET.get(other.kind) == budget for other in past if other.checkpoint == incident.checkpoint)
    if used >= TRIES[budget]:
        return Decision(False, f"{used + 1} failures without a new checkpoint")
    left = TRIES[budget] - used - 1
    return Decision(
        True,
        f"{left} {'retry' if left == 1 else 'retries'} left until the next checkpoint",
        after_s=min(_LONGEST_WAIT_S, 2.0**used) if used else 0.0,
        avoid=avoid,
    )


def _nodes_to_avoid(incidents: Sequence[Incident]) -> frozenset[str]:
    """Return the nodes with several failures, and those that failed the preflight check."""
    blamed = Counter(incident.node for incident in incidents if incident.node and incident.kind in _BUDGET)
    unfit = {incident.node for incident in incidents if incident.node and incident.kind is Kind.UNFIT}
    return frozenset({node for node, times in blamed.items() if times >= _BAD_NODE} | unfit)


_ADVICE = {
    Kind.MEMORY: (
        "set a smaller micro_tokens (it does not change the curve) or a higher sharding.stage, or take more workers"
    ),
    Kind.CRASH: "the log shows where it crashed; the likely cause is a library or a driver",
    Kind.UNFIT: "the preflight check found it (`--no-preflight` skips the check)",
    Kind.KILLED: "something outside Muster killed it",
    Kind.HANG: "the stack traces of all workers are in the log folder",
    Kind.STORAGE: "check the free space, the network and the credentials of the storage",
}


def describe_decision(error: MusterError, incident: Incident, decision: Decision) -> str:
    """Describe a failure for the user: who, where, what, what happens next, what to change, what it costs."""
    lost = max(0, incident.step - 1 - incident.checkpoint)
    lines = [f"{incident.kind}: {error}"]
    if not decision.retry:
        lines.append(f"not retrying: {decision.why}")
    else:
        wait = f" in {decision.after_s:.0f} s" if decision.after_s else ""
        where = f"from the checkpoint of step {incident.checkpoint}" if incident.checkpoint else "from the beginning"
        lines.append(f"retrying{wait} {where} (repeating {lost} {'step' if lost == 1 else 'steps'}); {decision.why}")
    if decision.avoid:
        lines.append(f"excluded from now on: {', '.join(sorted(decision.avoid))}")
    if incident.kind in _ADVICE:
        lines.append(_ADVICE[incident.kind])
    return "\n".join(lines)
