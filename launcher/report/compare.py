"""`muster compare`: statistical comparison of two runs: metrics that both measured, significance of the difference,
settings, time and cost.

Responses to the same questions are compared in pairs, which detects much smaller differences than two accuracies with
their intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.driver.budget import SPENT
from launcher.driver.progress import duration
from launcher.jobfile.job import flat
from launcher.runfolder import run_folder
from launcher.runfolder.run_folder import RunFolder
from training.errors import InputError, Problem
from training.recipes import RECIPES

_Z95 = 1.959963984540054
_FLIPS = 20_000
_APART = ("_low", "_high", "_per_s")
"""Ends of the names of metrics that say something of others, or of the machine."""


@dataclass(frozen=True)
class Side:
    """One phase of one run."""

    run: RunFolder
    phase: str
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.label or self.run.name}/{self.phase}"


def compare(first: str, second: str) -> dict[str, Any]:
    """Both as data. Raises InputError if there is nothing that both measured."""
    sides = _sides(first, second)
    ends = [_end(side) for side in sides]
    shared = [
        name
        for name in ends[0]
        if name.startswith("eval_")
        and not name.endswith(_APART)
        and all(isinstance(end.get(name), int | float) for end in ends)
    ]
    if not shared:
        has = "; ".join(
            f"{side.name}: {', '.join(n for n in end if n.startswith('eval_')) or 'none'}"
            for side, end in zip(sides, ends, strict=True)
        )
        raise InputError.of(
            f"{first}, {second}",
            f"no metric was measured by both ({has}); evaluate both models on the same questions with `muster eval`",
        )
    return {
        "runs": [_told(side, end) for side, end in zip(sides, ends, strict=True)],
        "metrics": {
            name: {
                "values": [end[name] for end in ends],
                "difference": ends[1][name] - ends[0][name] if _comparable(name, *sides) else None,
            }
            for name in shared
        },
        "answers": paired(
            *(right(side.run.answers(side.phase, end["step"])) for side, end in zip(sides, ends, strict=True))
        ),
        "settings": _differences(*sides),
    }


def _sides(*texts: str) -> list[Side]:
    """Raises InputError for both if it must."""
    found: list[Side] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            found.append(_side(text))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    same = found[0].run.folder.resolve() == found[1].run.folder.resolve()
    labels = [side.run.name for side in found] if same else run_folder.labels([side.run for side in found])
    return [replace(side, label=label) for side, label in zip(found, labels, strict=True)]


def _side(text: str) -> Side:
    """What RUN or RUN/PHASE means: a run's last phase that has measured something, unless it is named."""
    run, phase = run_folder.find_part(text)
    phases = list(run.job().phases)
    if phase is None:
        measured = [name for name in phases if run.evaluations(name)]
        phase = (measured or phases)[-1]
    return Side(run, phase)


def _end(side: Side) -> dict[str, Any]:
    """The evaluation of the step that the phase ended with, else its last one. Raises InputError if there is none."""
    rows = side.run.evaluations(side.phase)
    if not rows:
        raise InputError.of(side.name, "has no evaluations; set data.eval or eval in the phase, or use `muster eval`")
    chosen = side.run.chosen_step(side.phase)
    return next((row for row in reversed(rows) if row["step"] == chosen), rows[-1])


def right(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], bool]:
    """Whether each response of an evaluation was right, by question and sample."""
    whole = (row for row in rows if {"question", "correct"} <= row.keys())
    return {(json.dumps(row["question"]), row.get("sample", 0)): bool(row["correct"]) for row in whole}


def paired(first: Mapping[tuple[str, int], bool], second: Mapping[tuple[str, int], bool]) -> dict[str, Any] | None:
    """The second minus the first on the questions that both were asked, with a 95 % interval and the chance of a larger
    difference between two models that are equally good."""
    by_question: dict[str, list[int]] = {}
    for key in first.keys() & second.keys():
        by_question.setdefault(key[0], []).append(int(second[key]) - int(first[key]))
    if len(by_question) < 2:
        return None
    differences = [sum(each) / len(each) for _, each in sorted(by_question.items())]
    count = len(differences)
    mean = sum(differences) / count
    spread = math.sqrt(sum((each - mean) ** 2 for each in differences) / (count - 1))
    half = _Z95 * spread / math.sqrt(count)
    better, worse = (sum(sign * each > 0 for each in differences) for sign in (1, -1))
    once = all(len(each) == 1 for each in by_question.values())
    return {
        "questions": count, "difference": mean, "low": max(-1.0, mean - half), "high": min(1.0, mean + half),
        "better": better,
        "worse": worse, "test": "McNemar, exact" if once else "sign flips",
        "p": mcnemar(better, worse) if once else sign_flips(differences),
    }  # fmt: skip


def mcnemar(better: int, worse: int) -> float:
    """Chance of a split as uneven between questions that only one of two answered right, if neither is better (McNemar,
    Psychometrika 12, 1947; exact, by the binomial distribution, two-sided)."""
    count, fewer = better + worse, min(better, worse)
    if better == worse:
        return 1.0
    return float(min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count))


def sign_flips(differences: Sequence[float], seed: int = 0) -> float:
    """Chance of a mean as far from 0 if every difference had either sign alike
    (Fisher's randomisation test), by drawing signs."""
    import numpy as np

    values = np.array([each for each in differences if each])
    if not len(values):
        return 1.0
    signs = np.random.Generator(np.random.Philox(seed)).integers(0, 2, (_FLIPS, len(values))) * 2 - 1
    as_far = np.abs((signs * values).sum(1)) >= abs(values.sum()) - 1e-12
    return float((as_far.sum() + 1) / (_FLIPS + 1))


def _told(side: Side, end: Mapping[str, Any]) -> dict[str, Any]:
    steps = [row for row in side.run.metrics(side.phase) if "step_s" in row]
    spent = side.run.folder / SPENT
    return {
        "name": side.name,
        "recipe": side.run.job().phases[side.phase].recipe,
        "step": end["step"],
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": sum(row.get("tokens", 0) for row in steps),
        "training_s": sum(row["step_s"] for row in steps),
        "workers": steps[-1].get("workers") if steps else None,
        "run_cost": json.loads(spent.read_text())["cost"] if spent.exists() else None,
    }


def _comparable(metric: str, first: Side, second: Side) -> bool:
    """Whether both measured it on the same rows, in the same words: a loss on other rows says nothing."""
    return _measured_on(metric, first) == _measured_on(metric, second)


def _measured_on(metric: str, side: Side) -> tuple[Any, ...]:
    phase = side.run.job().phases[side.phase]
    asked = phase.eval
    classifier = RECIPES[phase.recipe].is_classifier  # which answers no questions: all its metrics are of held-out rows
    if classifier or metric == "eval_loss":
        return classifier, phase.data.eval, phase.data.template
    if metric.startswith("eval_verdict_"):
        return ("verdicts", asked and asked.verdicts, asked and asked.limit)
    return ("questions", asked and asked.data, asked and asked.limit)


def _differences(first: Side, second: Side) -> dict[str, list[Any]]:
    """Settings of the phases that are not the same, by key."""
    settings = [flat(side.run.job().phases[side.phase].model_dump(by_alias=True)) for side in (first, second)]
    keys = list(dict.fromkeys([*settings[0], *settings[1]]))
    return {key: [each.get(key) for each in settings] for key in keys if settings[0].get(key) != settings[1].get(key)}


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """For a terminal."""
    first, second = report["runs"]
    width = max(28, len(first["name"]), len(second["name"]))
    yield f"{'':<28}{first['name']:>{width}}  {second['name']:>{width}}  difference"
    for name, found in report["metrics"].items():
        values = "  ".join(f"{value:>{width}.4f}" for value in found["values"])
        told = "not comparable: different rows" if found["difference"] is None else f"{found['difference']:+.4f}"
        yield f"{name:<28}{values}  {told}"
    for label, key in (("recipe", "recipe"), ("evaluated at step", "step"), ("steps", "steps"), ("workers", "workers")):
        yield f"{label:<28}{_or_dash(first[key]):>{width}}  {_or_dash(second[key]):>{width}}"
    yield f"{'tokens':<28}{first['tokens']:>{width},}  {second['tokens']:>{width},}"
    times = [duration(each["training_s"]) for each in (first, second)]
    yield f"{'time in steps':<28}{times[0]:>{width}}  {times[1]:>{width}}"
    if any(each["run_cost"] for each in (first, second)):
        costs = [f"{each['run_cost'] or 0:,.2f}" for each in (first, second)]
        yield f"{'cost of the whole run':<28}{costs[0]:>{width}}  {costs[1]:>{width}}"
    yield from _verdict(report["answers"], first["name"], second["name"])
    if report["settings"]:
        yield "different settings:"
    for key, (before, after) in report["settings"].items():
        yield f"  {key}: {_short(before)} | {_short(after)}"


def _verdict(paired: Mapping[str, Any] | None, first: str, second: str) -> Iterator[str]:
    if paired is None:
        yield (
            "no significance test: the two have no responses to the same questions (set `eval:` in a phase to write "
            "them)"
        )
        return
    told = (
        f"{paired['questions']:,} shared questions: {second} is {100 * paired['difference']:+.1f} points "
        f"(95 %: {100 * paired['low']:+.1f} to {100 * paired['high']:+.1f}); better on {paired['better']}, worse on "
        f"{paired['worse']}; p = {paired['p']:.3g} ({paired['test']})"
    )
    yield told
    if paired["p"] < 0.05:
        yield f"{second if paired['difference'] > 0 else first} is better; the difference is statistically significant"
    else:
        yield "the difference is not statistically significant; evaluate more questions"


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"...{Path(text).name}" if "/" in text else f"{text[:57]}..."
