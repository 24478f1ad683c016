"""Builds the timeline of a run from its events: intervals, moments and failures.
Pure; it accepts events of other versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

WAITING, LOADING, TRAINING, REDONE, RECOVERING = "waiting", "loading", "training", "redone", "recovering"
"""Kinds of intervals: waiting for machines; loading model, data and checkpoint; training; training that was lost; the
time from a failure to the next attempt."""


@dataclass(frozen=True)
class Stretch:
    """An interval from `begin` to `end`, in seconds since the run started."""

    phase: str
    kind: str
    begin: float
    end: float
    attempt: int


@dataclass(frozen=True)
class Moment:
    """An event at the time `at`, in seconds since the run started."""

    phase: str
    kind: str
    """checkpoint | failure | resize | moved | stopped | rewound | warning | done"""
    at: float
    text: str


@dataclass
class Timeline:
    """The timeline of a run."""

    began: datetime | None = None
    stretches: list[Stretch] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    vanished: int = 0
    """Number of drivers that ended without a final event."""

    @property
    def end(self) -> float:
        """Seconds from the start to the last known moment."""
        ends = [each.end for each in self.stretches] + [each.at for each in self.moments]
        return max(ends, default=0.0)

    def seconds(self, phase: str, kind: str) -> float:
        return sum(each.end - each.begin for each in self.stretches if (each.phase, each.kind) == (phase, kind))

    @property
    def active(self) -> float:
        """Seconds of activity or waiting, without the time between a stop and the next start by a user."""
        return sum(each.end - each.begin for each in self.stretches)


def timeline(events: Iterable[Mapping[str, Any]], until: datetime | None = None, trained_s: float = 0.0) -> Timeline:
    """Build the timeline of a run's events. `until`: now, for a running one; `trained_s`: seconds of steps after the
    last checkpoint, for a run whose driver is gone."""
    teller = _Teller()
    for event in events:
        teller.hear(event)
    if until is not None and teller.found.began is not None:
        teller.close((until - teller.found.began).total_seconds())
    elif teller.kind is not None:
        teller.last = max(teller.last, teller.saved + trained_s)
        teller.vanish()
    return teller.found


class _Teller:
    def __init__(self) -> None:
        self.found = Timeline()
        self.phase, self.attempt = "", 0
        self.kind: str | None = None
        self.since = self.saved = self.last = 0.0
        self.workers: dict[str, int] = {}
        self.vanished: tuple[float, int] | None = None

    def hear(self, event: Mapping[str, Any]) -> None:
        at = self._at(event)
        if at is None:
            return
        kind = event.get("event")
        self.phase = str(event.get("phase") or self.phase)
        if kind == "started":
            if self.kind is not None and not event.get("by_itself"):
                self.vanish()
            self.close(at)
            self.attempt = attempt if isinstance(attempt := event.get("attempt"), int) else self.attempt + 1
            if event.get("by_itself"):
                self.open(WAITING, at)
        elif kind == "phase_started":
            self.close(at)
            self.open(WAITING, at)
        elif kind == "workers":
            self.close(at)
            self._count(event, at)
            self.open(LOADING, at)
        elif kind == "training":
            self.close(at)
            self.found_lost(event.get("redone_s"), at)
            self.open(TRAINING, at)
            self.saved = at
        elif kind == "incident":
            self.lose(at)
            self.note("failure", at, _describe(event))
            self.open(RECOVERING, at)
        elif kind == "interrupted":
            if self.kind is not None:  # else --only ended the run in a version before 0.2
                self.note("stopped", at, "stopped by a user or a scheduler")
            self.close(at) if event.get("orderly", True) else self.lose(at)
        elif kind in ("phase_finished", "done", "partial", "moved", "limit_reached", "failed"):
            self.close(at)
            self._end(str(kind), event, at)
        else:
            self._within(str(kind), event, at)
        self.last = at

    def _at(self, event: Mapping[str, Any]) -> float | None:
        try:
            time = datetime.fromisoformat(str(event.get("time")))
            self.found.began = self.found.began or time
            return max(self.last, (time - self.found.began).total_seconds())  # clocks are set back
        except (ValueError, TypeError):
            return None

    def _within(self, kind: str, event: Mapping[str, Any], at: float) -> None:
        if kind == "checkpoint":
            self.saved = at
            self.note("checkpoint", at, f"checkpoint of step {event.get('step')}")
        elif kind == "warning":
            self.note("warning", at, str(event.get("what")))
        elif kind in ("save_failed", "checkpoint_damaged"):
            self.note("warning", at, str(event.get("error") or event.get("finding")))
        elif kind == "rewound":
            to = event.get("to")
            steps = ", ".join(f"{name} to step {step}" for name, step in to.items()) if isinstance(to, dict) else ""
            self.note("rewound", at, f"rewound: {steps}")

    def _end(self, kind: str, event: Mapping[str, Any], at: float) -> None:
        if kind == "moved":
            self.note("moved", at, f"saved, and moved to other machines: {event.get('why')}")
        elif kind == "limit_reached":
            self.note("stopped", at, str(event.get("what")))
        elif kind == "failed":
            self.note("failure", at, "failed: " + str(event.get("error")).partition("\n")[0])
        elif kind == "phase_finished":
            self.note("done", at, f"{self.phase} is finished")

    def _count(self, event: Mapping[str, Any], at: float) -> None:
        members = event.get("workers")
        count = len(members) if isinstance(members, list) else 0
        before = self.workers.get(self.phase)
        if before is not None and before != count:
            self.note("resize", at, f"continues with {count} workers instead of {before}")
        self.workers[self.phase] = count

    def open(self, kind: str, at: float) -> None:
        self.kind, self.since = kind, at

    def close(self, at: float) -> None:
        if self.kind is not None and at > self.since:
            self.found.stretches.append(Stretch(self.phase, self.kind, self.since, at, self.attempt))
        self.kind = None

    def lose(self, at: float) -> None:
        """Mark the training since the last checkpoint as lost."""
        if self.kind == TRAINING and self.since <= self.saved < at:
            saved = self.saved
            self.close(saved)
            self.open(REDONE, saved)
        self.close(at)

    def vanish(self) -> None:
        """Handle a driver that wrote no final event, as after SIGKILL: the interval ends with its last event."""
        self.found.vanished += 1
        self.vanished = (self.last, self.attempt)
        self.note("failure", self.last, "the driver process ended without a final event")
        self.close(self.last)

    def found_lost(self, seconds: Any, at: float) -> None:
        """Add the time of the steps after the last checkpoint of a vanished driver, which is known once they are
        repeated."""
        if self.vanished is not None and isinstance(seconds, int | float) and seconds > 0:
            since, attempt = self.vanished
            self.found.stretches.append(Stretch(self.phase, REDONE, since, min(at, since + seconds), attempt))
        self.vanished = None

    def note(self, kind: str, at: float, text: str) -> None:
        self.found.moments.append(Moment(self.phase, kind, at, text))


def _describe(event: Mapping[str, Any]) -> str:
    who = "" if event.get("rank") is None else f"worker {event.get('rank')} on {event.get('node')} "
    then = "recovered automatically" if event.get("retry") else "not retried"
    return f"{event.get('class')}: {who}{event.get('message')} (step {event.get('step')}); {then}"
