"""What models wrote, for a report: before and after, several models side by side,
the best and the worst of PPO; cut to what is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.process.terminal import printable
from launcher.report.charts import number
from launcher.report.compare import paired, right
from launcher.runfolder import run_folder
from launcher.runfolder.run_folder import RunFolder

_SAMPLES = 8
_RESPONSES = 5
"""Best and worst responses of PPO."""
_RECENT = 0.2
"""Of the iterations of PPO: from these come the best and the worst."""
_LONG = 1500
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Part:
    """One phase of one run."""

    run: RunFolder
    label: str
    """Of the run: its name, or more if two have the same."""
    phase: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{self.label}/{self.phase}"

    @property
    def recipe(self) -> str:
        return str(self.settings.get("recipe") or self.phase)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return self.run.metrics(self.phase)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return run_folder.evaluations_in(self.rows)

    @cached_property
    def chosen(self) -> dict[str, Any] | None:
        """The evaluation of the weights that the phase ended with, else its last one."""
        step = self.run.chosen_step(self.phase)
        found = (row for row in reversed(self.evaluations) if row["step"] == step)
        return next(found, self.evaluations[-1] if self.evaluations else None)

    def answers(self, step: int) -> dict[str, dict[str, Any]]:
        """The first response to every question of an evaluation, by question."""
        rows = self.run.answers(self.phase, step)
        whole = [row for row in rows if {"question", "response", "correct"} <= row.keys()]
        return {str(row["question"]): row for row in reversed(whole) if not row.get("sample")}


def short(text: Any) -> str:
    whole = printable(str(text if text is not None else "").strip())
    return whole if len(whole) <= _LONG else whole[:_LONG] + " ..."


def before_after(part: Part) -> dict[str, Any] | None:
    """The same questions to the model at its first evaluation and at the one that counts."""
    steps = [row["step"] for row in part.evaluations]
    if part.chosen is None or (found := _first_answered(part, steps)) is None:
        return None
    first_step, first = found
    last_step, last = _first_answered(part, [part.chosen["step"], *reversed(steps)]) or found
    both = [question for question in first if question in last] if first_step != last_step else list(last)
    kinds: dict[str, list[str]] = {"became right": [], "became wrong": [], "stayed wrong": [], "stayed right": []}
    for question in both:
        was, now = first[question]["correct"], last[question]["correct"]
        kinds[("stayed " if was == now else "became ") + ("right" if now else "wrong")].append(question)
    few = max(1, _SAMPLES // sum(map(bool, kinds.values()))) if both else 0
    shown = [
        {
            "question": short(question),
            "expected": short(last[question].get("expected")),
            "before": _answer(first[question]) if first_step != last_step else None,
            "after": _answer(last[question]),
        }
        for each in kinds.values()
        for question in each[:few]
    ]
    counts = {kind: len(each) for kind, each in kinds.items()}
    return {"first_step": first_step, "last_step": last_step, "counts": counts, "asked": len(both), "rows": shown}


def _first_answered(part: Part, steps: Sequence[int]) -> tuple[int, dict[str, dict[str, Any]]] | None:
    """Of these steps the first whose evaluation has written answers, and those."""
    return next(((step, rows) for step in steps if (rows := part.answers(step))), None)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": short(row["response"]), "correct": bool(row["correct"])}


def responses(part: Part) -> dict[str, Any] | None:
    """The best and worst of the last responses of PPO, and some of the first iteration."""
    rows = [
        row
        for row in run_folder.json_rows(part.run.phase(part.phase) / run_folder.SAMPLES)
        if number(row.get("reward")) is not None and number(row.get("step")) is not None
    ]
    if not rows:
        return None
    last = max(row["step"] for row in rows)
    first = min(row["step"] for row in rows)
    recent = [row for row in rows if row["step"] > last - max(1, _RECENT * (last - first + 1))]
    ordered = sorted(recent, key=lambda row: row["reward"])
    worst = _distinct(ordered, _RESPONSES)
    best = [row for row in _distinct(ordered[::-1], _RESPONSES) if row not in worst]
    start = _distinct([row for row in rows if row["step"] == first], _RESPONSES) if first != last else []
    chosen = {"best": best, "worst": worst, "first": start}
    told = {name: [_response(row) for row in each] for name, each in chosen.items()}
    return {**told, "first_step": first, "last_step": last}


def _distinct(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Of equal responses to a prompt the first alone."""
    kept = {json.dumps([row.get("row"), row.get("response")], default=str): row for row in reversed(rows)}
    return list(reversed(kept.values()))[:count]


def _response(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": row["step"],
        "prompt": short(_prompt(row.get("row"))),
        "text": short(row.get("response")),
        "reward": row["reward"],
        "kl": number(row.get("kl")),
        "ended": bool(row.get("ended", True)),
    }


def _prompt(row: Any) -> str:
    """What was asked, of the row of the data that it came from."""
    if not isinstance(row, dict):
        return str(row)
    for name in ("prompt", "question", "messages", "instruction", "text"):
        value = row.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict)]
            return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    return next((value for value in row.values() if isinstance(value, str)), "")


# Several phases before the same questions


def _answering(parts: Sequence[Part]) -> list[tuple[Part, int]]:
    """Phases that have answered questions, with the step whose answers count."""
    chosen = [(part, part.chosen["step"]) for part in parts if part.chosen is not None]
    return [(part, step) for part, step in chosen if part.answers(step)]


def pairs(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Which of two is better, and whether that may be chance, for all that have answered the same questions."""
    answered = [(part.key, right(part.run.answers(part.phase, step))) for part, step in _answering(parts)]
    found = []
    for place, (first, before) in enumerate(answered):
        for second, after in answered[place + 1 :]:
            if (test := paired(before, after)) is not None:
                found.append({"first": first, "second": second, **test})
    return found


def side_by_side(parts: Sequence[Part]) -> dict[str, Any] | None:
    """Questions that several phases have answered, those first on which they differ."""
    answered = [(part.key, part.answers(step)) for part, step in _answering(parts)]
    if len(answered) < 2:
        return None
    shared: Counter[str] = Counter(question for _, each in answered for question in each)
    questions = [question for question, count in shared.items() if count > 1]
    if not questions:
        return None
    shown = [(key, each) for key, each in answered if any(question in each for question in questions)]

    def differ(question: str) -> bool:
        return len({each[question]["correct"] for _, each in shown if question in each}) > 1

    ordered = sorted(questions, key=lambda question: (not differ(question), -shared[question]))[:_SAMPLES]
    return {
        "columns": [key for key, _ in shown],
        "rows": [
            {
                "question": short(question),
                "expected": next(short(each[question].get("expected")) for _, each in shown if question in each),
                "answers": [_answer(each[question]) if question in each else None for _, each in shown],
            }
            for question in ordered
        ],
    }
