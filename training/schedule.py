"""How many steps a phase has, and the learning rate at each: functions of the settings alone."""

from __future__ import annotations

import math

from training.config import Phase, Schedule


def total_samples(phase: Phase, epoch_size: int) -> int:
    """Samples that the phase trains on in all; the last global batch may be smaller than the others."""
    if phase.max_steps is not None:
        return phase.max_steps * phase.step_samples
    return max(1, round((phase.epochs if phase.epochs is not None else 1) * epoch_size))


def total_steps(phase: Phase, epoch_size: int) -> int:
    """Optimizer steps of the phase."""
    return math.ceil(total_samples(phase, epoch_size) / phase.step_samples)


def never_profiled(phase: Phase, total: int) -> list[str]:
    """What to tell of a profile of steps that the phase, of `total` steps, does not come to."""
    if phase.profile is None or phase.profile.first <= total:
        return []
    return [f"profile.steps {phase.profile.steps} comes after the last step, {total:,}: nothing is profiled"]


def learning_rate(peak: float, schedule: Schedule, step: int, total: int) -> float:
    """The learning rate of step 1..total.

    Rises in a line to `peak` at the last warm-up step, then falls to floor * peak at the last step; constant stays.
    """
    warmup = schedule.warmup * total if schedule.warmup < 1 else schedule.warmup
    warmup = min(math.ceil(warmup), total)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    match schedule.name:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - progress
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.floor + (1.0 - schedule.floor) * remaining)
