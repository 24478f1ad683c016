"""The driver of every single-role recipe: a function of one group, which it asks for short calls.

Between two calls nothing is in flight, so this is where evaluation, checkpoints and a request to stop come in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from training.checkpoint import Checkpoints, File, Manifest, step_of
from training.config import Phase
from training.facts import Facts
from training.group import Group, results

SETUP_S = 3600.0
"""Longest time for loading a model, writing a checkpoint, or an evaluation."""
CALL_S = 1800.0
"""Longest time for one call of a few steps."""
_TARGET_CALL_S = 2.0


class Hooks(Protocol):
    """What the run offers to a recipe's driver."""

    checkpoints: Checkpoints
    job_hash: str

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics."""
        ...

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened, for the record and the terminal."""
        ...

    def started(self, facts: Facts, step: int) -> None:
        """Training begins, `step` steps are done already."""
        ...

    def stop_requested(self) -> bool:
        """Whether to save and return at the next opportunity."""
        ...


@dataclass
class _Progress:
    step: int
    evaluated: dict[str, float]
    """Evaluation at `step`; empty if there was none."""
    saved: int
    """Step of the newest checkpoint."""


def run(phase: Phase, groups: Mapping[str, Group], hooks: Hooks) -> Path | None:
    """Train the phase to its end; returns its last checkpoint, or None if it was asked to stop before."""
    trainer = groups["trainer"]
    facts: Facts = results(trainer.call("setup"), SETUP_S)[0]
    step = _resume(trainer, hooks)
    progress = _Progress(step=step, evaluated={}, saved=step)
    hooks.started(facts, step)
    pace = 0.0  # seconds a step, of the last call
    while progress.step < facts.total_steps:
        if hooks.stop_requested():
            _save(phase, trainer, hooks, facts, progress)
            return None
        num_steps = min(_next_stop(phase, facts, progress.step) - progress.step, _steps_in_a_call(pace))
        began = time.monotonic()
        _train(trainer, hooks, progress, num_steps)
        pace = (time.monotonic() - began) / num_steps
        if _evaluates(phase, facts, progress.step):
            _evaluate(trainer, hooks, progress)
        if progress.step % phase.checkpoint.every == 0 or progress.step == facts.total_steps:
            _save(phase, trainer, hooks, facts, progress)
    return hooks.checkpoints.at(progress.step)


def _steps_in_a_call(pace: float) -> int:
    return max(1, int(_TARGET_CALL_S / pace)) if pace else 1


def _next_stop(phase: Phase, facts: Facts, step: int) -> int:
    """The next step after which there is something else to do than the next step."""
    stops = [facts.total_steps, (step // phase.checkpoint.every + 1) * phase.checkpoint.every]
    if phase.eval_every is not None and facts.num_eval_samples:
        stops.append((step // phase.eval_every + 1) * phase.eval_every)
    return min(stops)


def _evaluates(phase: Phase, facts: Facts, step: int) -> bool:
    if not facts.num_eval_samples:
        return False
    for_choice = phase.checkpoint.best is not None and step % phase.checkpoint.every == 0
    on_time = phase.eval_every is not None and step % phase.eval_every == 0
    return step == facts.total_steps or on_time or for_choice


def _resume(trainer: Group, hooks: Hooks) -> int:
    """Restore the newest whole checkpoint; returns its step, 0 if there is none."""
    hooks.checkpoints.sweep()
    folder, findings = hooks.checkpoints.newest_whole()
    for finding in findings:
        hooks.event("checkpoint_damaged", finding=finding)
    if folder is None:
        return 0
    results(trainer.call("restore", str(folder)), SETUP_S)
    hooks.event("restored", step=step_of(folder), checkpoint=str(folder))
    return step_of(folder)


def _train(trainer: Group, hooks: Hooks, progress: _Progress, num_steps: int) -> None:
    answers = results(trainer.call("train", progress.step, num_steps), CALL_S)
    memory = max(answer["memory_gib"] for answer in answers)
    for row in answers[0]["rows"]:
        hooks.log({**row, "memory_gib": memory, "workers": trainer.size})
    progress.step += num_steps
    progress.evaluated = {}


def _evaluate(trainer: Group, hooks: Hooks, progress: _Progress) -> None:
    progress.evaluated = results(trainer.call("evaluate"), SETUP_S)[0]
    hooks.log({"step": progress.step, **progress.evaluated})


def _save(phase: Phase, trainer: Group, hooks: Hooks, facts: Facts, progress: _Progress) -> None:
    if progress.step == progress.saved:
        return
    began = time.monotonic()
    with hooks.checkpoints.staging(progress.step) as staged:
        shards = results(trainer.call("save", str(staged)), SETUP_S)
        folder = hooks.checkpoints.commit(staged, _manifest(phase, trainer.size, hooks, facts, progress, shards))
    progress.saved = progress.step
    hooks.event("checkpoint", step=progress.step, checkpoint=str(folder), seconds=round(time.monotonic() - began, 3))
    best = phase.checkpoint.best
    hooks.checkpoints.retain(
        phase.checkpoint.keep,
        best=best.metric if best else None,
        smaller_is_better=best is None or best.mode == "min",
    )


def _manifest(
    phase: Phase, num_workers: int, hooks: Hooks, facts: Facts, progress: _Progress, shards: Sequence[Mapping[str, Any]]
) -> Manifest:
    return Manifest(
        phase=phase.recipe,
        step=progress.step,
        samples=progress.step * phase.batch,
        optimizer_step=shards[0]["optimizer_step"],
        attempt=hooks.checkpoints.attempt,
        world_size=num_workers,
        zero_stage=phase.sharding.stage,
        dtype=facts.dtype,
        formats=facts.formats,
        job_hash=hooks.job_hash,
        data_hash=facts.data_hash,
        metrics=progress.evaluated,
        parameters=shards[0]["parameters"],
        files=[File(**shard["file"]) for shard in shards],
        versions={name: version(name) for name in ("torch", "deepspeed", "transformers", "muster-train")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
