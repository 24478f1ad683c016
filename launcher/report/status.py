"""`muster list`, `status` and `checkpoints`: describes runs, as data and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.driver.progress import duration
from launcher.runfolder.run_folder import RUNS, RunFolder, runs_in
from training.checkpoint.format import CheckpointError, Manifest, verify
from training.checkpoint.repository import Checkpoints, step_of
from training.errors import InputError
from training.storage import StoragePath, is_remote


def status(run: RunFolder) -> dict[str, Any]:
    """Return the status of a run."""
    events = run.events()
    finished = run.finished_phases()
    phases = {name: _phase(run, name, name in finished, events) for name in run.job().phases}
    return {
        "name": run.name,
        "folder": run.address,
        "state": run.state(),
        "attempts": run.attempts(),
        "started": events[0]["time"] if events else None,
        "phases": phases,
        "remaining": [name for name in phases if name not in finished],
        "workers": next((len(event["workers"]) for event in reversed(events) if event["event"] == "workers"), None),
        "problems": [words for event in events if (words := _problem(event))][-3:],
    }


def _problem(event: Mapping[str, Any]) -> str | None:
    """Describe an event that is a problem; None for other events."""
    if event["event"] == "incident":
        who = "" if event["rank"] is None else f"worker {event['rank']} on {event['node']} "
        what = "retried" if event["retry"] else "not retried"
        return (
            f"{event['time'][:19]} step {event['step']}: {event['class']}: {who}{event['message']}; {what}: "
            f"{event['why']}"
        )
    if event["event"] == "warning":
        return f"{event['time'][:19]} {event['what']}"
    return event.get("error") if event["event"] == "failed" else event.get("finding")


def _phase(run: RunFolder, name: str, finished: bool, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = run.metrics(name)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if any(name.startswith("eval_") for name in row)]
    total = next((e["total_steps"] for e in reversed(events) if e["event"] == "training" and e["phase"] == name), None)
    last = steps[-1] if steps else {}
    left = (total - last["step"]) * _median_step_s(steps) if steps and total and not finished else None
    planned = next((e for e in reversed(events) if e["event"] == "planned" and e["phase"] == name), None)
    return {
        "finished": finished,
        "step": last.get("step", 0),
        "total_steps": total,
        "loss": last.get("loss"),
        "tokens_per_s": last.get("tokens_per_s"),
        "left_s": left,
        "plan": against_plan(planned, steps, left) if planned is not None and steps else None,
        "evaluation": {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")} if evaluations else {},
        "checkpoints": [step_of(folder) for folder in Checkpoints(run.checkpoints(name)).folders()],
        "model": str(run.model(name)) if run.model(name).children() else None,
    }


def against_plan(planned: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], left: float | None) -> dict[str, Any]:
    """Compare the plan with the measurements, and estimate the remaining cost from these."""
    real, price = _median_step_s(steps), planned["price"]
    memory = max(row["memory_gib"] for row in steps[-50:])
    return {
        "step_s": planned["step_s"],
        "range": planned["range"],
        "real_step_s": real,
        "times": real / planned["step_s"],
        "memory_gib": planned["memory_gib"],
        "real_memory_gib": memory,
        "hours": planned["hours"],
        "left_cost": None if left is None or price is None else left / 3600 * price,
    }


def _median_step_s(steps: Sequence[Mapping[str, Any]]) -> float:
    recent = sorted(row["step_s"] for row in steps[-50:])
    return float(recent[len(recent) // 2])


def status_lines(info: Mapping[str, Any]) -> Iterator[str]:
    workers = f", {info['workers']} worker{'s' * (info['workers'] != 1)}" if info["workers"] else ""
    yield f"{info['name']}: {info['state']}, attempt {info['attempts']}{workers}, started {info['started']}"
    for name, phase in info["phases"].items():
        if not phase["step"]:
            yield f"  {name}: not started"
            continue
        parts = [f"step {phase['step']}/{phase['total_steps']}", f"loss {phase['loss']:.4f}"]
        parts += [f"{metric} {value:.4f}" for metric, value in phase["evaluation"].items()]
        if phase["left_s"] is not None:
            parts.append(f"{duration(phase['left_s'])} left")
        parts.append("checkpoints " + (", ".join(map(str, phase["checkpoints"])) or "none"))
        yield f"  {name}: " + "  ".join(parts)
        if phase["plan"] is not None:
            yield f"  {name}: {_describe_plan(phase['plan'])}"
        if phase["model"]:
            yield f"  {name}: model in {phase['model']}"
    if info["state"] == "partial":
        yield f"  `muster resume {info['folder']}` runs the remaining phases: {', '.join(info['remaining'])}"
    for problem in info["problems"]:
        yield f"  {problem}"


def _describe_plan(plan: Mapping[str, Any]) -> str:
    low, high = plan["range"]
    within = "as planned" if low <= plan["real_step_s"] <= high else f"{plan['times']:.2f} times the plan"
    text = (
        f"a step takes {plan['real_step_s']:.3g} s, planned {plan['step_s']:.3g} ({low:.3g} to {high:.3g}): {within}"
        f"; {plan['real_memory_gib']:.2f} GiB, planned {plan['memory_gib']:.2f}"
    )
    return text + (f"; remaining cost {plan['left_cost']:,.2f}" if plan["left_cost"] is not None else "")


def listing(storage: str) -> list[dict[str, Any]]:
    """Return the status of all runs in a folder, the newest last, or in a bucket. Raises InputError if the folder does
    not exist, unless it is the default one."""
    folder = Path(storage)
    if not is_remote(storage) and not folder.is_dir() and (folder.exists() or folder != RUNS):
        raise InputError.of(storage, "is a file; give a folder of runs" if folder.exists() else "no such folder")
    return [_status_or_problem(run) for run in runs_in(storage)]


def _status_or_problem(run: RunFolder) -> dict[str, Any]:
    """Return the status of a run; one that cannot be read must not hide the others."""
    try:
        return status(run)
    except InputError as error:
        return {
            "name": run.name,
            "folder": run.address,
            "state": "unreadable",
            "phases": {},
            "problems": [str(error)],
        }


def listing_lines(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not runs:
        yield "no runs"
    for run in runs:
        steps = ", ".join(f"{name} {p['step']}/{p['total_steps'] or '?'}" for name, p in run["phases"].items())
        yield f"{run['name']:<24} {run['state']:<12} {steps}".rstrip()
        if run["state"] == "unreadable":
            yield from (f"  {problem}" for problem in run["problems"])


def checkpoints(run: RunFolder, *, deep: bool) -> list[dict[str, Any]]:
    """Return every checkpoint of a run. With `deep`, every byte is verified, otherwise only the sizes of the files."""
    found = []
    for phase in run.job().phases:
        for folder in Checkpoints(run.checkpoints(phase)).folders():
            found.append({"phase": phase, "step": step_of(folder), "folder": str(folder), **_contents(folder, deep)})
    return found


def _contents(folder: StoragePath, deep: bool) -> dict[str, Any]:
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return {"whole": False, "problems": [str(error)]}
    problems = verify(folder, deep=deep)
    return {
        "whole": not problems,
        "verified": deep,
        "problems": problems,
        "weights_only": manifest.weights_only,
        "bytes": sum(file.size for file in manifest.files),
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "attempt": manifest.attempt,
        "metrics": manifest.metrics,
        "created": manifest.created,
    }


def checkpoint_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not found:
        yield "no checkpoints"
    for entry in found:
        head = f"{entry['phase']} step {entry['step']:>7}"
        if not entry["whole"]:
            yield f"{head}  DAMAGED"
            yield from (f"  {problem}" for problem in entry["problems"])
            continue
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in entry["metrics"].items())
        size = entry["bytes"] / 2**20
        state = "verified" if entry["verified"] else "complete"
        state += ", weights only" if entry["weights_only"] else ""
        yield (
            f"{head}  {state}  {size:,.1f} MiB  {entry['world_size']} workers, ZeRO-{entry['zero_stage']}  "
            f"{entry['created']}  {metrics}"
        ).rstrip()
