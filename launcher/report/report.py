"""`muster report`: what runs were, what happened to them and what came of it, as plain data.
`html.py` makes a page of it.

A run may be of another version, still at work, or cut off in the middle of a line: what cannot be
read is left out and told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.driver.budget import SPENT
from launcher.jobfile import yaml_with_lines
from launcher.report import charts, samples, status
from launcher.report.charts import number
from launcher.report.samples import Part
from launcher.report.timeline import LOADING, RECOVERING, REDONE, TRAINING, WAITING, Timeline, timeline
from launcher.runfolder import run_folder
from launcher.runfolder.run_folder import RunFolder
from training import __version__
from training.errors import InputError, Problem

_EVALUATIONS = 12
"""Rows of a table of evaluations: the first, the last, and some between."""
_INCIDENTS = 30
_APART = ("_low", "_high", "_per_s", "_eos_rate", "_tokens")
_SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
SPENT_ON = {
    WAITING: "starting workers, waiting for machines",
    LOADING: "loading model, data and checkpoint",
    "steps": "steps",
    "sync": "sending weights to the rollout workers",
    "generate": "generating responses",
    "score": "scoring responses",
    "learn": "learning from responses",
    "evaluating": "evaluating",
    "saving": "waiting for checkpoints",
    "other": "other",
    REDONE: "repeating lost training",
    RECOVERING: "detecting failures and restarting",
}
"""Descriptions of the parts of the time."""


def report(names: Sequence[str]) -> dict[str, Any]:
    """All of it. Raises InputError that names every run that is not there, and if none has begun."""
    chosen = _chosen(names)
    told, parts = [], []
    for (run, phases), label in zip(chosen, run_folder.labels([run for run, _ in chosen]), strict=True):
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
        raise InputError.of(
            addresses, "nothing was trained yet (no metrics); use `muster run` or `muster resume` first"
        )
    times = [phase["time"] for run in told for phase in run["phases"]]
    sources = [charts.Source(part.key, part.recipe, part.rows) for part in parts]
    return {
        "version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": told,
        "spent_on": {kind: words for kind, words in SPENT_ON.items() if any(kind in time for time in times)},
        "charts": charts.charts(sources),
        "pairs": samples.pairs(parts),
        "side_by_side": samples.side_by_side(parts),
    }


def _chosen(names: Sequence[str]) -> list[tuple[RunFolder, list[str]]]:
    """Each run once, with the phases that are asked for; none: all of them."""
    found: dict[str, tuple[RunFolder, list[str]]] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            run, phase = run_folder.find_part(name)
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


def _settings(run: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """The job as it was resolved, and what is wrong with it: another version may have known other settings."""
    problems = []
    try:
        run.job()
    except InputError as error:
        more = f" and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        problems.append(f"this version cannot read the job: {error.problems[0]}{more}")
    try:
        settings = yaml_with_lines.load(run.folder / run_folder.JOB).data
    except InputError as error:
        settings, problems = {}, [str(error)]
    phases = settings.get("phases")
    if not isinstance(phases, dict):
        phases = {name: {} for name in run.phase_names()}
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
    times = timeline(events, datetime.now(UTC) if state == "running" else None, _trained_since_saved(events, parts))
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
        "job": _SECRET_IN_ADDRESS.sub("***@", _text(run.folder / run_folder.JOB)),
        "problems": problems + _error(events, state),
        "incidents": incidents[-_INCIDENTS:],
        "incident_count": len(incidents) + times.vanished,
        "recovered": bool(incidents) and not times.vanished and state in ("done", "partial", "running", "interrupted"),
        "lost_s": sum(each.end - each.begin for each in times.stretches if each.kind in (REDONE, RECOVERING)),
        "stretches": [asdict(each) for each in times.stretches],
        "moments": [asdict(each) for each in times.moments],
        "length": times.end,
        "phases": [_phase(part, events, times) for part in parts],
    }


def _error(events: Sequence[Mapping[str, Any]], state: str) -> list[str]:
    """Why a run has failed."""
    if state != "failed":
        return []
    error = next(event.get("error") for event in reversed(events) if event["event"] == "failed")
    return [f"failed: {samples.short(error)}"]


def _trained_since_saved(events: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> float:
    """Seconds of steps of the last phase at work behind what the run last wrote down of it."""
    last: Mapping[str, Any] = next((e for e in reversed(events) if e["event"] in ("training", "checkpoint")), {})
    rows = next((part.rows for part in parts if part.phase == last.get("phase")), [])
    step = number(last.get("step")) or 0.0
    return sum(number(row.get("step_s")) or 0.0 for row in rows if (number(row.get("step")) or 0.0) > step)


def _list(value: Any) -> list[Any]:
    """What another version wrote where a list stands now may be anything."""
    return value if isinstance(value, list) else []


def _machines(events: Sequence[Mapping[str, Any]]) -> set[str]:
    members = [member for e in events if e["event"] == "workers" for member in _list(e.get("workers"))]
    return {str(member["machine"]) for member in members if isinstance(member, dict) and "machine" in member}


def _incident(event: Mapping[str, Any]) -> dict[str, Any]:
    step, checkpoint = number(event.get("step")), number(event.get("checkpoint"))
    return {
        "time": str(event.get("time"))[:19].replace("T", " "),
        "phase": event.get("phase"),
        "class": event.get("class"),
        "who": None if event.get("rank") is None else f"worker {event['rank']} on {event.get('node')}",
        "message": samples.short(event.get("message")),
        "lost_steps": max(0, int(step - checkpoint) - 1) if step is not None and checkpoint is not None else None,
        "then": "recovered automatically" if event.get("retry") else "not retried",
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
        "notes": _list(begun.get("notes")),
        "workers": len(_list(members.get("workers"))) or None,
        "tokens": sum(number(row.get("tokens")) or 0.0 for row in steps),
        "model": _plain(part.settings, "model", "path"),
        "lora": _plain(part.settings, "model", "lora"),
        "data": _plain(part.settings, "data", "train"),
        "batch": part.settings.get("batch"),
        "learning_rate": part.settings.get("learning_rate"),
        "stage": _plain(part.settings, "sharding", "stage"),
        "results": list(_results(part.recipe, steps, part.evaluations, part.chosen)),
        "evaluations": _evaluation_table(part.recipe, part.evaluations, part.chosen),
        "time": _time(rows, mine, times, part.phase),
        "before_after": samples.before_after(part),
        "responses": samples.responses(part),
        "plan": _plan(mine, steps),
    }


def _plain(settings: Mapping[str, Any], *path: str) -> Any:
    """A setting as it is shown."""
    value: Any = settings
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    text = value if isinstance(value, str) or value is None else json.dumps(value)
    return text if text is None else _SECRET_IN_ADDRESS.sub("***@", text)


def _results(
    recipe: str,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Any] | None,
) -> Iterator[dict[str, Any]]:
    """The few numbers that say what came of it: before, after, with intervals where there are any."""
    for name in charts.learnt(recipe):
        known = charts.called(recipe, name)
        told = {
            "metric": name, "title": charts.title(known), "fraction": charts.is_share(known),
            "better": "down" if name.endswith("loss") else "up",
        }  # fmt: skip
        if name.startswith("eval_"):
            measured = [row for row in evaluations if number(row.get(name)) is not None]
            after = chosen if chosen in measured else measured[-1] if measured else None
            if after is None:
                continue
            before = measured[0] if measured[0] is not after else None
            yield {
                **told, "before": before and before[name], "before_step": before and before["step"],
                "after": after[name],
                "low": number(after.get(f"{name}_low")), "high": number(after.get(f"{name}_high")),
                "after_step": after["step"],
            }  # fmt: skip
        elif values := [value for row in steps if (value := number(row.get(name))) is not None]:
            few = max(1, len(values) // 20)  # a single step is chance
            yield {
                **told, "before": sum(values[:few]) / few, "before_step": None, "after": sum(values[-few:]) / few,
                "low": None,
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
    places = set(charts.spread(len(evaluations), _EVALUATIONS))
    places |= {place for place, row in enumerate(evaluations) if row is chosen}
    rows = []
    for place in sorted(places):
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
    known = [charts.called(recipe, name) for name in names]
    titles = [{"title": charts.title(each), "fraction": charts.is_share(each)} for each in known]
    return {"names": titles, "rows": rows, "of": len(evaluations)}


def _time(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], times: Timeline, phase: str
) -> dict[str, float]:
    """Where the time went, in seconds by the keys of `SPENT_ON`;
    the parts of training by what its rows say of themselves."""

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
        return status.against_plan(planned, timed, None) if planned is not None and timed else None
    except (KeyError, TypeError, ValueError):  # of another version
        return None
