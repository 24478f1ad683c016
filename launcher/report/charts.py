"""Turns rows of metrics into charts: which curves share a chart, thinned to the resolution of a screen. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from training.metric_schema import Metric
from training.recipes import RECIPES, Recipe, metric

LEARNING, POLICY, MACHINES, REST = _SECTIONS = ("learning", "policy", "machines", "rest")
"""Of a report, in their order."""
_POINTS = 1200
"""Of a curve: about as many as a wide chart has pixels."""


_LEARNT = tuple(dict.fromkeys(name for recipe in RECIPES.values() for name in recipe.shows_learning))
"""Metrics that show whether a model learns, of any recipe."""
_IN_SECTIONS = {
    POLICY: ("kl", "response_tokens", "eos_rate", "entropy", "clip_fraction", "explained_variance", "value_loss"),
    MACHINES: ("tokens_per_s", "step_s", "data_s", "memory_gib", "workers"),
}
_NO_CURVES = ("step", "iteration", "attempt", "tokens", "target_tokens", "samples", "ppo_epochs", "skipped")
_BOUNDS = ("_low", "_high")
_BAND = " The band is its 95 % interval."


@dataclass(frozen=True)
class Source:
    """The metrics of one phase of one run."""

    key: str
    recipe: str
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def tokens(self) -> list[float]:
        """Learnt from up to each row."""
        return list(accumulate(number(row.get("tokens")) or 0.0 for row in self.rows))

    @cached_property
    def hours(self) -> list[float]:
        """Of steps up to each row."""
        return list(accumulate((number(row.get("step_s")) or 0.0) / 3600 for row in self.rows))


def number(value: Any) -> float | None:
    """A finite number as it stands in a row; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def learnt(recipe: str) -> tuple[str, ...]:
    """The metrics that say whether a model of this recipe learns."""
    return RECIPES[recipe].shows_learning if recipe in RECIPES else Recipe.shows_learning


def called(recipe: str, name: str) -> Metric:
    """What a metric is; of one that nobody has written a word about, such as another version's, its name."""
    return metric(recipe, name) or Metric(name.replace("_", " "), "", "")


def is_share(found: Metric) -> bool:
    """Whether it is shown in percent."""
    return found.unit == "0 to 1"


def charts(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """All that there is to draw, in the order of the sections: {section, metric, title, about, unit, fraction, curves}.

    In one chart is one metric, of recipes for which it means the same.
    """
    drawn: dict[tuple[str, str, Metric], list[dict[str, Any]]] = {}
    for source in sources:
        for name in dict.fromkeys(name for row in source.rows for name in row):
            if name not in _NO_CURVES and not name.endswith(_BOUNDS) and (curve := _curve(source, name)):
                drawn.setdefault((_section(source.recipe, name), name, called(source.recipe, name)), []).append(curve)
    titles = Counter(title(found) for _, _, found in drawn)
    return [
        {
            "section": section,
            "metric": name,
            "title": title(found) + (f" ({_recipes(curves, sources)})" if titles[title(found)] > 1 else ""),
            "about": found.meaning.replace("`", "") + (_BAND if any("low" in curve for curve in curves) else ""),
            "unit": "" if is_share(found) else found.unit,
            "fraction": is_share(found),
            "curves": curves,
        }
        for (section, name, found), curves in sorted(drawn.items(), key=lambda entry: _place(*entry[0][:2]))
        if not (name == "workers" and _all_equal(curves))
    ]


def title(found: Metric) -> str:
    return found.label[:1].upper() + found.label[1:]


def _recipes(drawn: Sequence[Mapping[str, Any]], sources: Sequence[Source]) -> str:
    recipe = {source.key: source.recipe for source in sources}
    return ", ".join(dict.fromkeys(recipe[curve["of"]] for curve in drawn))


def _section(recipe: str, name: str) -> str:
    if name in learnt(recipe):
        return LEARNING
    return next((section for section, names in _IN_SECTIONS.items() if name in names), REST)


def _place(section: str, name: str) -> tuple[int, int]:
    """In the page."""
    ordered: dict[str, tuple[str, ...]] = {LEARNING: _LEARNT, **_IN_SECTIONS}
    names = ordered.get(section, ())
    return _SECTIONS.index(section), names.index(name) if name in names else 0


def _all_equal(found: Sequence[Mapping[str, Any]]) -> bool:
    return all(min(curve["value"]) == max(curve["value"]) for curve in found)


def _curve(source: Source, name: str) -> dict[str, Any] | None:
    """Values over steps, tokens and hours of training; with the interval where there is one."""
    points = [
        (place, step, value)
        for place, row in enumerate(source.rows)
        if (value := number(row.get(name))) is not None and (step := number(row.get("step"))) is not None
    ]
    if not points:
        return None
    kept = [points[i] for i in thinned([value for _, _, value in points], _POINTS)]
    places = [place for place, _, _ in kept]
    bounds = {
        end: [number(source.rows[place].get(f"{name}_{end}")) for place in places]
        for end in ("low", "high")
        if any(f"{name}_{end}" in source.rows[place] for place in places)
    }
    return {
        "of": source.key,
        "step": [step for _, step, _ in kept],
        "tokens": [source.tokens[place] for place in places],
        "hours": [round(source.hours[place], 6) for place in places],
        "value": [float(f"{value:.6g}") for _, _, value in kept],
        **bounds,
    }


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Places of at most `most` values that look like all of them: the ends,
    and of every stretch its least and greatest."""
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
