"""`muster check`: the job file, then every row of its data. Starts nothing; loads torch only to read rows with a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import capacity, plan, site, trackers
from launcher import job as jobs
from launcher.cache import cache_folder
from launcher.job import Job
from launcher.site import Site, UnknownSite
from training import questions
from training.config import Phase
from training.data import files
from training.data.files import HubSplit, Located
from training.errors import InputError
from training.modelfiles import tokenizer_of
from training.recipes import RECIPES


def load(file: Path, overrides: Sequence[str], *, inline: bool = False, force: bool = False) -> Job:
    """The job in a file, checked against this machine too. Raises InputError with every problem."""
    job = jobs.load(file, overrides)
    machine(job, inline=inline, force=force)
    return job


def machine(job: Job, *, inline: bool, force: bool = False) -> None:
    """Raises InputError if this machine lacks a package or the room that the job needs. `force`: room is not looked at."""
    trackers.check(job.track, where=str(job.file))
    capacity.check(job, inline=inline, force=force)
    if not force and capacity.num_gpus() and (inline or "RAY_ADDRESS" not in os.environ):
        fits_gpus(job, lambda: [site.here()])


def fits_gpus(job: Job, where: Callable[[], Sequence[Site]]) -> None:
    """Raises InputError if a phase cannot fit on the GPUs of any of some sites, where those are known."""
    refusals = []
    with suppress(UnknownSite):
        for found in where():
            try:
                if found.on_gpu:
                    plan.refuse_what_cannot_fit(job, found)
                return
            except InputError as error:
                refusals.append(error)
        raise refusals[0]


def check(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Raises InputError with everything that is wrong; else what was read, by phase."""
    job = load(file, overrides)
    return {"name": job.name, "phases": job.look_at_phases(_rows)}


def _rows(phase: Phase) -> dict[str, Any]:
    """Counts of the rows of a phase, and what could not be looked at."""
    questions.check(phase)
    located = [
        source
        for data in (phase.data.train, phase.data.eval)
        if data is not None
        for source in files.expand(data, Path.cwd(), documents=RECIPES[phase.recipe].reads_documents)
    ]
    local = [source for source in located if not _on_hub(source)]
    notes = [
        f"{source.source.path} is on the hub; its rows are read when the job runs"
        for source in located
        if _on_hub(source)
    ]
    if not local:
        return {"recipe": phase.recipe, "notes": notes}
    tokenizer = tokenizer_of(phase.model)
    if notes or not os.path.isdir(tokenizer):
        from training.data.prepare import check_rows

        findings = check_rows(local, phase.data, RECIPES[phase.recipe].formats)
        notes += findings.notes
        if not os.path.isdir(tokenizer):
            notes.append(f"lengths were not looked at: the tokenizer {tokenizer} is on the hub")
        return {"recipe": phase.recipe, "rows": findings.rows, "formats": dict(findings.formats), "notes": notes}
    return {"recipe": phase.recipe, **_counts(phase)}


def _counts(phase: Phase) -> dict[str, Any]:
    from training.data.stores import open_stores

    stores = open_stores(phase, cache_folder())
    parts = {"train": stores.train, "eval": stores.eval}
    counts = {
        name: {
            "rows": store.meta.rows,
            "samples": store.meta.kept,
            "tokens": store.meta.tokens,
            "target_tokens": store.meta.target_tokens,
            "longest": store.meta.longest,
            "formats": store.meta.formats,
        }
        for name, store in parts.items()
        if store is not None
    }
    notes = list(dict.fromkeys(note for store in parts.values() if store is not None for note in store.meta.notes))
    return {**counts, "notes": notes}


def _on_hub(source: Located) -> bool:
    return any(isinstance(part, HubSplit) for part in source.parts)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a terminal."""
    for name, phase in report["phases"].items():
        for part in ("train", "eval"):
            if part in phase:
                counts = phase[part]
                yield (
                    f"{name}: {part}: {counts['samples']:,} samples of {counts['rows']:,} rows, {counts['tokens']:,} tokens, "
                    f"{counts['target_tokens']:,} of them targets; the longest has {counts['longest']:,}"
                )
        if "rows" in phase:
            yield f"{name}: {phase['rows']:,} rows"
        for note in phase["notes"]:
            yield f"{name}: {note}"
    yield f"{report['name']}: ok"
