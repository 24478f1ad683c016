"""Rows of metrics as curves to be drawn: which belong into one chart, thinned to what an eye can tell apart. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

LEARNING, POLICY, MACHINES, REST = "learning", "policy", "machines", "rest"
"""Sections of a report, in their order."""
_POINTS = 1200
"""Of a curve: about as many as a wide chart has pixels."""

Row = Mapping[str, Any]
Metrics = Sequence[Row]


@dataclass(frozen=True)
class Chart:
    """What is drawn over each other: one metric, of recipes for which it means the same."""

    section: str
    metric: str
    title: str
    about: str
    """For somebody who has never trained a model."""
    unit: str = ""
    recipes: tuple[str, ...] = ()
    """None: all."""
    fraction: bool = False
    """Shown in percent."""


_TEXT = ("pretrain", "sft", "cft")
CHARTS = (
    Chart(LEARNING, "loss", "Training loss", "How badly the model foretells the text that it learns from; falling is learning.", "nats a token", _TEXT),
    Chart(LEARNING, "eval_loss", "Held-out loss", "The same on text that it does not learn from. If it rises while the training loss falls, the model learns by heart.", "nats a token", _TEXT),
    Chart(LEARNING, "loss", "Training loss of the reward model", "0.69 is guessing which of two answers is better, 0 is never being wrong.", "nats a pair", ("reward",)),
    Chart(LEARNING, "eval_loss", "Held-out loss of the reward model", "The same on pairs that it does not learn from.", "nats a pair", ("reward",)),
    Chart(LEARNING, "eval_accuracy", "Right answers", "Of questions that the model was never trained on; the band is the 95 % interval.", recipes=(*_TEXT, "ppo"), fraction=True),
    Chart(LEARNING, "eval_accuracy", "Pairs in the right order", "How often the reward model prefers the answer that people preferred; half is guessing.", recipes=("reward",), fraction=True),
    Chart(LEARNING, "eval_verdict_accuracy", "Right verdicts", "How often the model, shown an answer, says rightly whether it is right.", fraction=True),
    Chart(LEARNING, "reward", "Reward", "What the reward model gives the policy's responses, on average; rising is learning.", recipes=("ppo",)),
    Chart(POLICY, "kl", "KL", "How far the policy has gone from where it started. Much of it at little reward is a warning.", "nats a response", ("ppo",)),
    Chart(POLICY, "response_tokens", "Length of responses", "A policy may learn to please by length alone.", "tokens", ("ppo",)),
    Chart(POLICY, "ended", "Responses that end by themselves", "The others were cut off at the longest length.", recipes=("ppo",), fraction=True),
    Chart(POLICY, "entropy", "Entropy", "How undecided the policy is. Near 0 it says always the same, and learns no more.", "nats a token", ("ppo",)),
    Chart(POLICY, "clip_fraction", "Clipped updates", "The part of tokens at which an update was held back; above 0.3 the learning rate is too high.", recipes=("ppo",), fraction=True),
    Chart(POLICY, "explained_variance", "Explained variance", "How well the critic foretells what comes; 1 is perfectly, 0 is not at all.", recipes=("ppo",)),
    Chart(POLICY, "value_loss", "Loss of the critic", "How far its forecasts are off.", recipes=("ppo",)),
    Chart(POLICY, "beta", "Weight of the KL", "How dear it is to leave the start.", recipes=("ppo",)),
    Chart(MACHINES, "tokens_per_s", "Throughput", "Of all workers together.", "tokens/s"),
    Chart(MACHINES, "step_s", "Time of a step", "An iteration, for PPO.", "s"),
    Chart(MACHINES, "memory_gib", "Memory", "Of the worker that needs most.", "GiB"),
    Chart(MACHINES, "workers", "Workers", "Fewer after machines were lost, more when they are back.", ""),
    Chart(REST, "grad_norm", "Gradient norm", "How hard a step pulls; spikes tell of odd data or too high a learning rate."),
    Chart(REST, "learning_rate", "Learning rate", "How far a step goes."),
)  # fmt: skip

_NO_CURVES = ("step", "iteration", "attempt", "tokens", "target_tokens", "samples", "evaluation_s", "skipped")
_BOUNDS = ("_low", "_high")


@dataclass(frozen=True)
class Source:
    """The metrics of one phase of one run."""

    key: str
    recipe: str
    rows: Metrics


def number(value: Any) -> float | None:
    """A finite number as it stands in a row; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def charts(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """All charts that have something to show, in the order of the sections: {title, about, unit, section, fraction, curves}."""
    found = []
    for chart in (*CHARTS, *_others(sources)):
        of_recipe = [source for source in sources if not chart.recipes or source.recipe in chart.recipes]
        curves = [curve for source in of_recipe if (curve := _curve(source, chart.metric))]
        if curves and not (chart.metric == "workers" and _all_equal(curves)):
            told = {name: getattr(chart, name) for name in ("section", "metric", "title", "about", "unit", "fraction")}
            found.append({**told, "curves": curves})
    return found


def _all_equal(found: Sequence[Mapping[str, Any]]) -> bool:
    return all(min(curve["value"]) == max(curve["value"]) for curve in found)


def _others(sources: Sequence[Source]) -> Iterator[Chart]:
    """Of metrics that nobody has written a word about, such as those of another version."""
    known = {(chart.metric, recipe) for chart in CHARTS for recipe in chart.recipes or ("",)}
    general = {metric for metric, recipe in known if not recipe}
    names = {
        name: None
        for source in sources
        for row in source.rows
        for name in row
        if name not in general
        and (name, source.recipe) not in known
        and name not in _NO_CURVES
        and not name.endswith(_BOUNDS)
    }
    for name in sorted(names):
        recipes = {source.recipe for source in sources} - {recipe for metric, recipe in known if metric == name}
        yield Chart(REST, name, name, "", recipes=tuple(recipes))


def _curve(source: Source, metric: str) -> dict[str, Any] | None:
    """Values over steps, tokens and hours of training; with the interval where there is one."""
    tokens = list(accumulate(number(row.get("tokens")) or 0.0 for row in source.rows))
    hours = list(accumulate((number(row.get("step_s")) or 0.0) / 3600 for row in source.rows))
    points = [
        (place, step, value)
        for place, row in enumerate(source.rows)
        if (value := number(row.get(metric))) is not None and (step := number(row.get("step"))) is not None
    ]
    if not points:
        return None
    kept = [points[i] for i in thinned([value for _, _, value in points], _POINTS)]
    places = [place for place, _, _ in kept]
    bounds = {
        end: [number(source.rows[place].get(f"{metric}_{end}")) for place in places]
        for end in ("low", "high")
        if any(f"{metric}_{end}" in source.rows[place] for place in places)
    }
    return {
        "of": source.key,
        "step": [step for _, step, _ in kept],
        "tokens": [tokens[place] for place in places],
        "hours": [round(hours[place], 6) for place in places],
        "value": [float(f"{value:.6g}") for _, _, value in kept],
        **bounds,
    }


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Places of at most `most` values that look like all of them: the ends, and of every stretch its least and greatest."""
    if len(values) <= most:
        return list(range(len(values)))
    stretches = (most - 2) // 2
    edges = [1 + i * (len(values) - 2) // stretches for i in range(stretches + 1)]
    chosen = {0, len(values) - 1}
    for begin, end in pairwise(edges):
        chosen |= {min(range(begin, end), key=values.__getitem__), max(range(begin, end), key=values.__getitem__)}
    return sorted(chosen)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
