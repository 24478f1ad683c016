"""Evaluation in short calls: between two of them a checkpoint is committed,
or the evaluation ends because the run is to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

from training.config import Phase
from training.drivers.hooks import Hooks
from training.evaluation.accuracy import Answers, Row, in_order, measured
from training.group import Group, results

PART_S = 3600.0
"""Longest time for one call: a few batches of data, or of responses."""
TARGET_S = 2.0
"""A call of several batches takes about that long."""


def is_evaluated_at(phase: Phase, step: int) -> bool:
    """Whether a step that is not the last is evaluated: as `eval_every` says,
    or because the best checkpoint is chosen by that."""
    for_choice = phase.save_period if phase.checkpoint.best is not None else None
    return any(step % period == 0 for period in (phase.eval_every, for_choice) if period is not None)


class Interrupted(Exception):
    """The run is to stop. The evaluation, or the iteration of PPO, is done again when it goes on."""


def answered(
    group: Group, hooks: Hooks, step: int, between: Callable[[], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """What the responses to the questions of `phase.eval` are measured as,
    and how fast they came; they are written down.

    `between` two calls is done between them. Raises Interrupted.
    """
    began = time.monotonic()
    metrics: dict[str, float] = {}
    tokens = 0
    for name, rows in sorted(_responses(group, hooks, between).items()):
        hooks.answers(step, name, in_order([rows]))
        metrics |= measured(in_order([rows]), f"eval_{name}")
        tokens += sum(row["tokens"] for row in rows)
    return metrics, {"eval_tokens_per_s": tokens / (time.monotonic() - began)}


def _responses(group: Group, hooks: Hooks, between: Callable[[], None]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    is_over = begun = False
    while not is_over:
        if hooks.stop_requested():
            raise Interrupted
        shares: list[Answers] = results(group.call("answer", TARGET_S, begin=not begun), PART_S)
        begun = True
        for share in shares:
            for name, responses in share.rows.items():
                rows.setdefault(name, []).extend(responses)
        is_over = all(share.is_last for share in shares)
        between()
    return rows


def measured_on_data(group: Group, hooks: Hooks, num_batches: int, between: Callable[[], None]) -> dict[str, float]:
    """What the recipe measures over all of `data.eval`. Raises Interrupted. `between` is done between two calls."""
    metrics: dict[str, float] = {}
    first, count = 0, 1
    while first < num_batches:
        if hooks.stop_requested():
            raise Interrupted
        began = time.monotonic()
        metrics = results(group.call("evaluate", first, count), PART_S)[0]
        first += count
        count = max(1, int(TARGET_S * count / (time.monotonic() - began)))
        between()
    return metrics
