"""`muster report`: what runs were, what happened to them and what came of it, as plain data. `page.py` makes a page of it.

A run may be of another version, still at work, or cut off in the middle of a line: what cannot be read is left out and told.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher import curves, runs, show, yamlfile
from launcher.compare import paired, right
from launcher.curves import number
from launcher.limits import SPENT
from launcher.runs import RunFolder
from launcher.terminal import printable
from launcher.timeline import LOADING, RECOVERING, REDONE, TRAINING, WAITING, Timeline, timeline
from training.errors import InputError, Problem

_EVALUATIONS = 12
"""Rows of a table of evaluations: the first, the last, and some between."""
_SAMPLES = 8
_RESPONSES = 5
"""Best and worst responses of PPO."""
_RECENT = 0.2
"""Of the iterations of PPO: from these come the best and the worst."""
_INCIDENTS = 30
_LONG = 1500
"""Characters of a text that are shown."""
_APART = ("_low", "_high", "_per_s", "_ended", "_tokens")
_SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
SPENT_ON = {
    WAITING: "starting workers, waiting for machines",
    LOADING: "loading model, data and checkpoint",
    "steps": "steps",
    "sync": "sending weights to those that write",
    "generate": "writing responses",
    "score": "judging responses",
    "learn": "learning from responses",
    "evaluating": "evaluating",
    "saving": "waiting for checkpoints",
    "other": "the rest",
    REDONE: "training that was lost and done again",
    RECOVERING: "noticing failures and starting anew",
}
"""What time is spent on."""


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
        return runs.evaluations_in(self.rows)


def report(names: Sequence[str]) -> dict[str, Any]:
    """All of it. Raises InputError that names every run that is not there, and if none has begun."""
    chosen = _chosen(names)
    told, parts = [], []
    for (run, phases), label in zip(chosen, _labels([run for run, _ in chosen]), strict=True):
        settings, problems = _settings(run)
        mine = [
            Part(run, label, name, of_phase)
            for name, of_phase in settings["phases"].items()
            if not phases or name in phases
        ]
        told.append(_run(run, label, settings, problems, mine))
        parts += mine
    if not any(part.rows for part in parts):
        addresses = ", ".join(run.address for run, _ in chosen)
        raise InputError.of(addresses, "nothing was trained yet (no metrics); `muster run` or `muster resume` first")
    times = [phase["time"] for run in told for phase in run["phases"]]
    sources = [curves.Source(part.key, part.recipe, part.rows) for part in parts]
    return {
        "version": metadata.version("muster-train"),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": told,
        "spent_on": {kind: words for kind, words in SPENT_ON.items() if any(kind in time for time in times)},
        "charts": curves.charts(sources),
        "pairs": _pairs(parts),
        "side_by_side": _side_by_side(parts),
    }


def _chosen(names: Sequence[str]) -> list[tuple[RunFolder, list[str]]]:
    """Each run once, with the phases that are asked for; none: all of them."""
    found: dict[str, tuple[RunFolder, list[str]]] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            run, phase = runs.find_part(name)
        except InputError as error:
            problems += error.problems
            continue
        key = run.address if run.remote else str(run.folder.resolve())
        wanted = [] if phase is None else [phase]
        if key in found:
            wanted = [*found[key][1], *wanted] if found[key][1] and wanted else []
        found[key] = (run, wanted)
    if problems:
        raise InputError(problems)
    return list(found.values())


def _labels(chosen: Sequence[RunFolder]) -> list[str]:
    """Names, with as much of the address before them as tells them apart."""
    addresses = [run.address if run.remote else str(run.folder.resolve()) for run in chosen]
    labels = [run.name for run in chosen]
    depth = 2
    while len(set(labels)) < len(labels):
        twice = {label for label, count in Counter(labels).items() if count > 1}
        longer = ["/".join(address.split("/")[-depth:]) for address in addresses]
        labels = [more if label in twice else label for label, more in zip(labels, longer, strict=True)]
        depth += 1
    return labels


def _settings(run: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """The job as it was resolved, and what is wrong with it: another version may have known other settings."""
    problems = []
    try:
        run.job()
    except InputError as error:
        more = f" and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        problems.append(f"its job cannot be read any more as it stands: {error.problems[0]}{more}")
    try:
        settings = yamlfile.load(run.folder / runs.JOB).data
    except InputError as error:
        settings, problems = {}, [str(error)]
    phases = settings.get("phases")
    if not isinstance(phases, dict):  # then what has metrics is a phase
        phases = {file.parent.name: {} for file in sorted(run.folder.glob(f"*/{runs.METRICS}"))}
    return {
        **settings,
        "phases": {name: each if isinstance(each, dict) else {} for name, each in phases.items()},
    }, problems


# A run


def _run(
    run: RunFolder, label: str, settings: Mapping[str, Any], problems: list[str], parts: Sequence[Part]
) -> dict[str, Any]:
    events = run.events()
    state = run.state()
    times = timeline(events, datetime.now(UTC) if state == "running" else None)
    versions: Mapping[str, Any] = next(
        (e["versions"] for e in reversed(events) if isinstance(e.get("versions"), dict)), {}
    )
    incidents = [_incident(event) for event in events if event["event"] == "incident"]
    return {
        "name": label,
        "address": run.address,
        "state": state,
        "began": times.began.isoformat(timespec="seconds") if times.began else None,
        "seconds": times.active,
        "attempts": sum(event["event"] == "started" for event in events),
        "machines": sorted(_machines(events)),
        "versions": {name: str(version) for name, version in versions.items()},
        "spent": _spent(run),
        "job": _SECRET_IN_ADDRESS.sub("***@", _text(run.folder / runs.JOB)),
        "problems": problems,
        "incidents": incidents[-_INCIDENTS:],
        "incident_count": len(incidents),
        "recovered": bool(incidents) and state in ("done", "running", "interrupted"),
        "lost_s": sum(each.end - each.begin for each in times.stretches if each.kind in (REDONE, RECOVERING)),
        "stretches": [asdict(each) for each in times.stretches],
        "moments": [asdict(each) for each in times.moments],
        "length": times.end,
        "phases": [_phase(part, events, times) for part in parts],
    }


def _machines(events: Sequence[Mapping[str, Any]]) -> set[str]:
    members = [member for e in events if e["event"] == "workers" for member in e.get("workers") or ()]
    return {str(member["machine"]) for member in members if isinstance(member, dict) and "machine" in member}


def _incident(event: Mapping[str, Any]) -> dict[str, Any]:
    step, checkpoint = number(event.get("step")), number(event.get("checkpoint"))
    return {
        "time": str(event.get("time"))[:19].replace("T", " "),
        "phase": event.get("phase"),
        "class": event.get("class"),
        "who": None if event.get("rank") is None else f"worker {event['rank']} on {event.get('node')}",
        "message": _short(event.get("message")),
        "lost_steps": max(0, int(step - checkpoint) - 1) if step is not None and checkpoint is not None else None,
        "then": "went on by itself" if event.get("retry") else "given up",
        "why": event.get("why"),
    }


def _spent(run: RunFolder) -> dict[str, float | None]:
    try:
        spent = json.loads(_text(run.folder / SPENT))
    except ValueError:
        spent = None
    return {name: number(spent.get(name)) if isinstance(spent, dict) else None for name in ("hours", "cost")}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# A phase


def _phase(part: Part, events: Sequence[Mapping[str, Any]], times: Timeline) -> dict[str, Any]:
    rows = part.rows
    mine = [event for event in events if event.get("phase") == part.phase]
    begun: Mapping[str, Any] = next((e for e in reversed(mine) if e["event"] == "training"), {})
    members: Mapping[str, Any] = next((e for e in reversed(mine) if e["event"] == "workers"), {})
    steps = [row for row in rows if number(row.get("loss")) is not None]
    evaluations = part.evaluations
    chosen = _chosen_evaluation(part)
    finished = part.phase in part.run.finished_phases()
    return {
        "name": part.phase,
        "key": part.key,
        "recipe": part.recipe,
        "state": "finished" if finished else "begun" if mine else "not begun",
        "step": steps[-1].get("step") if steps else 0,
        "total_steps": begun.get("total_steps"),
        "chosen_step": part.run.chosen_step(part.phase),
        "parameters": begun.get("parameters"),
        "samples": begun.get("samples"),
        "device": begun.get("device"),
        "dtype": begun.get("dtype"),
        "notes": list(begun.get("notes") or ()),
        "workers": len(members.get("workers") or ()) or None,
        "tokens": sum(number(row.get("tokens")) or 0.0 for row in steps),
        "model": _plain(part.settings, "model", "path"),
        "lora": _plain(part.settings, "model", "lora"),
        "data": _plain(part.settings, "data", "train"),
        "batch": part.settings.get("batch"),
        "learning_rate": part.settings.get("learning_rate"),
        "stage": _plain(part.settings, "sharding", "stage"),
        "results": list(_results(part.recipe, steps, evaluations, chosen)),
        "evaluations": _evaluation_table(part.recipe, evaluations, chosen),
        "time": _time(rows, mine, times, part.phase),
        "before_after": _before_after(part, evaluations, chosen),
        "responses": _responses(part),
        "plan": _plan(mine, steps),
    }


def _plain(settings: Mapping[str, Any], *path: str) -> Any:
    """A setting as it is shown."""
    value: Any = settings
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    text = value if isinstance(value, str) or value is None else json.dumps(value)
    return text if text is None else _SECRET_IN_ADDRESS.sub("***@", text)


def _chosen_evaluation(part: Part) -> Mapping[str, Any] | None:
    """Of the weights that the phase ended with, else the last one."""
    step = part.run.chosen_step(part.phase)
    found = (row for row in reversed(part.evaluations) if row["step"] == step)
    return next(found, part.evaluations[-1] if part.evaluations else None)


def _results(
    recipe: str,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Any] | None,
) -> Iterator[dict[str, Any]]:
    """The few numbers that say what came of it: before, after, with intervals where there are any."""
    for name in curves.learnt(recipe):
        known = curves.called(recipe, name)
        told = {
            "metric": name, "title": curves.title(known), "fraction": curves.is_share(known),
            "better": "down" if name.endswith("loss") else "up",
        }  # fmt: skip
        if name.startswith("eval_"):
            measured = [row for row in evaluations if number(row.get(name)) is not None]
            after = chosen if chosen in measured else measured[-1] if measured else None
            if after is None:
                continue
            before = measured[0] if measured[0] is not after else None
            yield {
                **told, "before": before and before[name], "before_step": before and before["step"], "after": after[name],
                "low": number(after.get(f"{name}_low")), "high": number(after.get(f"{name}_high")), "after_step": after["step"],
            }  # fmt: skip
        elif values := [value for row in steps if (value := number(row.get(name))) is not None]:
            few = max(1, len(values) // 20)  # a single step is chance
            yield {
                **told, "before": sum(values[:few]) / few, "before_step": None, "after": sum(values[-few:]) / few, "low": None,
                "high": None, "after_step": None,
            }  # fmt: skip


def _evaluation_table(
    recipe: str, evaluations: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Evaluations by step, with intervals; the one that counts is marked."""
    names = list(
        dict.fromkeys(
            name for row in evaluations for name in row if name.startswith("eval_") and not name.endswith(_APART)
        )
    )
    if not evaluations or not names:
        return None
    places = curves.spread(len(evaluations), _EVALUATIONS)
    rows = []
    for place in places:
        row = evaluations[place]
        cells = [
            {
                "value": number(row.get(name)),
                "low": number(row.get(f"{name}_low")),
                "high": number(row.get(f"{name}_high")),
            }
            for name in names
        ]
        rows.append({"step": row["step"], "cells": cells, "chosen": row is chosen})
    if chosen is not None and not any(row["chosen"] for row in rows):
        return _evaluation_table(recipe, [evaluations[i] for i in places[:-1]] + [chosen], chosen)
    known = [curves.called(recipe, name) for name in names]
    titles = [{"title": curves.title(each), "fraction": curves.is_share(each)} for each in known]
    return {"names": titles, "rows": rows, "of": len(evaluations)}


def _time(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], times: Timeline, phase: str
) -> dict[str, float]:
    """Where the time went, in seconds by the keys of `SPENT_ON`; the parts of training by what its rows say of themselves."""

    def summed(name: str, of: Sequence[Mapping[str, Any]] = rows) -> float:
        return sum(number(row.get(name)) or 0.0 for row in of)

    parts = {part: summed(f"{part}_s") for part in ("sync", "generate", "score", "learn")}
    inside = {
        **(parts if any(parts.values()) else {"steps": summed("step_s")}),
        "evaluating": summed("evaluation_s"),
        "saving": summed("stall_s", [event for event in events if event["event"] == "checkpoint"]),
    }
    outside = {kind: times.seconds(phase, kind) for kind in (WAITING, LOADING, REDONE, RECOVERING)}
    rest = max(0.0, times.seconds(phase, TRAINING) - sum(inside.values()))
    found = {**inside, **outside, "other": rest}
    return {kind: round(found[kind], 3) for kind in SPENT_ON if found.get(kind)}


def _plan(events: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    planned = next((e for e in reversed(events) if e["event"] == "planned"), None)
    timed = [row for row in steps if number(row.get("step_s")) and number(row.get("memory_gib")) is not None]
    try:
        return show.against_plan(planned, timed, None) if planned is not None and timed else None
    except (KeyError, TypeError, ValueError):  # of another version
        return None


# Texts


def _short(text: Any) -> str:
    whole = printable(str(text if text is not None else "").strip())
    return whole if len(whole) <= _LONG else whole[:_LONG] + " ..."


def _before_after(
    part: Part, evaluations: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The same questions to the model at its first evaluation and at the one that counts."""
    answered = [(row["step"], rows) for row in evaluations if (rows := _answers(part, row["step"]))]
    if not answered:
        return None
    first_step, first = answered[0]
    last_step, last = next((pair for pair in reversed(answered) if chosen and pair[0] == chosen["step"]), answered[-1])
    both = [question for question in first if question in last] if first_step != last_step else list(last)
    kinds: dict[str, list[str]] = {"became right": [], "became wrong": [], "stayed wrong": [], "stayed right": []}
    for question in both:
        was, now = first[question]["correct"], last[question]["correct"]
        kinds[("stayed " if was == now else "became ") + ("right" if now else "wrong")].append(question)
    few = max(1, _SAMPLES // sum(map(bool, kinds.values()))) if both else 0
    shown = [
        {
            "question": _short(question),
            "expected": _short(last[question].get("expected")),
            "before": _answer(first[question]) if first_step != last_step else None,
            "after": _answer(last[question]),
        }
        for each in kinds.values()
        for question in each[:few]
    ]
    counts = {kind: len(each) for kind, each in kinds.items()}
    return {"first_step": first_step, "last_step": last_step, "counts": counts, "asked": len(both), "rows": shown}


def _answers(part: Part, step: int) -> dict[str, dict[str, Any]]:
    """The first response to every question of an evaluation, by question."""
    return _by_question(part.run.answers(part.phase, step))


def _by_question(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole = [row for row in rows if {"question", "response", "correct"} <= row.keys()]
    return {str(row["question"]): row for row in reversed(whole) if not row.get("sample")}


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": _short(row["response"]), "correct": bool(row["correct"])}


def _responses(part: Part) -> dict[str, Any] | None:
    """The best and worst of the last responses of PPO, and some of the first iteration."""
    rows = [
        row
        for row in runs.json_rows(part.run.phase(part.phase) / runs.SAMPLES)
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
        "prompt": _short(_prompt(row.get("row"))),
        "text": _short(row.get("response")),
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


def _answering(parts: Sequence[Part]) -> list[tuple[Part, list[dict[str, Any]]]]:
    """Phases that have answered questions, with the answers that count."""
    found = []
    for part in parts:
        chosen = _chosen_evaluation(part)
        if chosen is not None and (rows := part.run.answers(part.phase, chosen["step"])):
            found.append((part, rows))
    return found


def _pairs(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Which of two is better, and whether that may be chance, for all that have answered the same questions."""
    answered = [(part.key, right(rows)) for part, rows in _answering(parts)]
    found = []
    for place, (first, before) in enumerate(answered):
        for second, after in answered[place + 1 :]:
            if (test := paired(before, after)) is not None:
                found.append({"first": first, "second": second, **test})
    return found


def _side_by_side(parts: Sequence[Part]) -> dict[str, Any] | None:
    """Questions that several phases have answered, those first on which they differ."""
    answered = [(part.key, _by_question(rows)) for part, rows in _answering(parts)]
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
                "question": _short(question),
                "expected": next(_short(each[question].get("expected")) for _, each in shown if question in each),
                "answers": [_answer(each[question]) if question in each else None for _, each in shown],
            }
            for question in ordered
        ],
    }
