"""What is done about a failure: evidence in, decision out. Pure: knows neither Ray nor processes nor the clock.

`decide` looks at an incident in the light of the earlier ones. What is charged to a budget is forgotten once a new
checkpoint shows that the run makes progress.
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


def describe_decision(error: MusterError, incident: Incident, decision: Decision) -> str:
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
