"""What happens in a phase after a failure: recorded, decided, reported and waited for.
The decision itself is launcher/driver/retry_policy.py."""

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
    """A phase that is not tried again, in the words that the person has read."""


class Recovery:
    """The failures of one phase of a run, those of earlier attempts included."""

    def __init__(self, run: OpenRun, name: str, phase: Phase, say: Callable[[str], None]):
        self.run, self.name, self.phase, self.say = run, name, phase, say
        self.past = incidents(run.events(), name)

    def after(self, error: MusterError, *, step: int, checkpoint: int) -> Decision:
        """What to do after a failure, once it is time to. Raises GaveUp,
        or the error itself where there is nothing to judge."""
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
        """Steps whose batches are not trained on."""
        return frozenset(
            event["skip"]
            for event in self.run.events()
            if event["event"] == "incident" and event["phase"] == self.name and event.get("skip") is not None
        )


def incidents(events: Iterable[Mapping[str, Any]], phase: str) -> list[Incident]:
    """What a run has written down of a phase's failures since a person last started it, oldest first."""
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
