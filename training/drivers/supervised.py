"""The driver of every single-role recipe: a function of one group, which it asks for short calls.

Between two calls nothing is in flight, so this is where evaluation, checkpoints and a request to stop come in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial

from training.config import Phase
from training.drivers.evaluating import Interrupted, answered, is_evaluated_at, measured_on_data
from training.drivers.hooks import Hooks, note_damage
from training.drivers.profiled_steps import Profiled
from training.drivers.restore import SETUP_S, resume
from training.drivers.saver import Saver
from training.group import Group, results
from training.phase_info import PhaseInfo
from training.storage import StoragePath

CALL_S = 1800.0
"""Longest time for one call of a few steps."""
_TARGET_CALL_S = 2.0
_CALL_S_A_WORKER = 0.04
"""Asking many workers takes the driver its time, about 0.4 ms for each: longer calls keep that below a hundredth."""
_MANY = 64
_SAVING_CALL_S = 0.25
"""The same while a checkpoint is being written: the sooner it is committed, the less a failure costs."""


def run(phase: Phase, groups: Mapping[str, Group], hooks: Hooks) -> StoragePath | None:
    """Train the phase to its end; returns the checkpoint that it ends with, or None if it was asked to stop before."""
    trainer = groups["trainer"]
    infos: list[PhaseInfo] = results(trainer.call("setup"), SETUP_S)
    note_damage(infos, hooks)
    info = infos[0]
    learners = {"trainer": trainer}
    found = resume(learners, hooks, info)
    step = found.step if found is not None else 0
    results(trainer.call("get_ready", hooks.skipped), SETUP_S)
    saver = Saver(phase, learners, hooks, info, newest=step)
    profiled = Profiled(phase, groups, hooks)
    is_due = found is not None and not found.metrics and _evaluates(phase, info, step)
    hooks.started(info, step, evaluates=is_due)
    pace = 0.0  # seconds a step, of the last call
    is_evaluated = True
    if is_due or (phase.eval_on_start and step == 0):
        is_evaluated = _evaluate(phase, trainer, hooks, info, saver, step)
    while step < info.total_steps and not hooks.stop_requested():
        within_s = _SAVING_CALL_S if saver.is_saving else min(_TARGET_CALL_S, max(0.0, saver.due_in_s()))
        num_steps = min(_next_stop(phase, info, step) - step, _steps_in_a_call(pace, trainer.size, within_s))
        profiled.before(step + 1)
        began = time.monotonic()
        with saver.kept_on_failure():
            _train(trainer, hooks, step, num_steps)
        pace = (time.monotonic() - began) / num_steps
        step += num_steps
        profiled.after(step)
        saver.poll()
        if saver.is_due(step):
            saver.save(step)
        if _evaluates(phase, info, step):  # after the save: whatever ends a long evaluation, no step is lost
            is_evaluated = _evaluate(phase, trainer, hooks, info, saver, step)
    profiled.end(step)
    last = saver.end(step)
    return last if is_evaluated else None


def _steps_in_a_call(pace: float, workers: int, within_s: float) -> int:
    """`pace`: seconds of a step, 0 if that is not known yet."""
    fewest = math.ceil(_CALL_S_A_WORKER * workers / pace) if pace else 1
    return max(1, int(within_s / pace), fewest if workers > _MANY else 1) if pace else 1


def _next_stop(phase: Phase, info: PhaseInfo, step: int) -> int:
    """The next step after which there is something else to do than the next step."""
    periods = [period for period in (phase.save_period, phase.eval_every) if period is not None]
    stops = [info.total_steps, *((step // period + 1) * period for period in periods)]
    if phase.profile is not None:
        stops += [stop for stop in (phase.profile.first - 1, phase.profile.last) if stop > step]
    return min(stops)


def _evaluates(phase: Phase, info: PhaseInfo, step: int) -> bool:
    if not info.num_eval_samples and phase.eval is None:
        return False
    return step == info.total_steps or is_evaluated_at(phase, step)


def _train(trainer: Group, hooks: Hooks, done: int, num_steps: int) -> None:
    answers = results(trainer.call("train", done, num_steps), CALL_S)
    memory = max(answer["memory_gib"] for answer in answers)
    hooks.paces([answer["pace"] for answer in answers])
    hooks.gpus_full([answer["gpu_full"] for answer in answers])
    for row in answers[0]["rows"]:
        hooks.log({**row, "memory_gib": memory, "workers": trainer.size})


def _evaluate(phase: Phase, trainer: Group, hooks: Hooks, info: PhaseInfo, saver: Saver, step: int) -> bool:
    """Evaluate the state after `step`. False if the run is to stop: then it is due when the run goes on."""
    began = time.monotonic()
    metrics: dict[str, float] = {}
    speed: dict[str, float] = {}
    between = partial(saver.attend, step)
    try:
        with saver.kept_on_failure():
            if info.num_eval_samples:
                num_batches = math.ceil(info.num_eval_samples / phase.batch)
                metrics |= measured_on_data(trainer, hooks, num_batches, between)
            if phase.eval is not None:
                answers, speed = answered(trainer, hooks, step, between)
                metrics |= answers
    except Interrupted:
        return False
    hooks.log({"step": step, **metrics, **speed, "evaluation_s": time.monotonic() - began})
    saver.evaluated(step, metrics)
    return True
