"""Handles the failures of a phase: records them, reports the decision of retry_policy.py and waits before a retry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launcher.driver.open_run import OpenRun
from launcher.driver.retry_policy import Decision, Incident, decide, describe_decision
from launcher.workers.errors import NoMachines, WorkerError, kind_of
from training.config import Phase
from training.errors import Diverged, InputError, MusterError, Superseded, TrainingError


class GaveUp(TrainingError):
    """A phase failed and is not retried. The message describes the failure for the user."""


class Recovery:
    """The failures of one phase of a run, including those of earlier attempts."""

    def __init__(self, run: OpenRun, name: str, phase: Phase, say: Callable[[str], None]):
        self.run, self.name, self.phase, self.say = run, name, phase, say
        self.past = incidents(run.events(), name)

    def after(self, error: MusterError, *, step: int, checkpoint: int) -> Decision:
        """Decide what to do after a failure, and wait before a retry. Raises GaveUp if there is none,
        or the error itself if it is not a failure to recover from."""
        if isinstance(error, InputError | Superseded | NoMachines):
            raise error
        # An attempt that fails before it has found the checkpoint has not lost it.
        checkpoint = max([checkpoint, *(earlier.checkpoint for earlier in self.past)])
        incident = _incident(error, max(step, checkpoint), checkpoint)
        decision = decide(incident, self.past, skip_diverged=self.phase.on_divergence == "skip")
        self.past.append(incident)
        self.run.event(
            "incident", phase=self.name, **incident.fields(), retry=decision.retry, why=decision.why, skip=decision.skip
        )
        words = describe_decision(error, incident, decision)
        if not decision.retry:
            raise GaveUp(words) from error
        self.say(f"{self.name}: {words}")
        time.sleep(decision.after_s)
        return decision

    def skipped(self) -> frozenset[int]:
        """Return the steps whose batches are skipped."""
        return frozenset(
            event["skip"]
            for event in self.run.events()
            if event["event"] == "incident" and event["phase"] == self.name and event.get("skip") is not None
        )


def incidents(events: Iterable[Mapping[str, Any]], phase: str) -> list[Incident]:
    """Return the recorded failures of a phase since the user last started the run, oldest first."""
    found: list[Incident] = []
    for event in events:
        if event["event"] == "started" and not event.get("by_itself"):
            found = []
        elif event["event"] == "incident" and event["phase"] == phase:
            found.append(Incident.of(event))
    return found


def _incident(error: MusterError, step: int, checkpoint: int) -> Incident:
    worker = error if isinstance(error, WorkerError) else None
    return Incident(
        kind=kind_of(error),
        message=(worker.message if worker else str(error)).partition("\n")[0],
        step=error.step if isinstance(error, Diverged) else step,
        checkpoint=checkpoint,
        rank=worker.rank if worker else None,
        node=worker.node if worker else None,
    )
