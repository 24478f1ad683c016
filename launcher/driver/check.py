"""`muster check`: the job file, then every row of its data. Starts nothing;
loads torch only to read rows with a tokenizer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.driver import checkpoint_quota, model_probe, trackers
from launcher.jobfile import job as jobs
from launcher.jobfile.job import Job
from launcher.plan import hardware, local_capacity, plan
from launcher.plan.hardware import HardwareProfile, UnknownHardware
from launcher.runfolder.cache import cache_folder
from training.config import Phase
from training.data import questions, reward_signature, vocabulary
from training.data.files import HubSplit, Located, without_effect
from training.data.phase_data import data_of, prepare_phase, sources_of
from training.data.prepare import bad_rows_note
from training.device import num_gpus
from training.errors import InputError
from training.estimate import model_traits
from training.estimate.model_traits import Traits
from training.model_folder import notes_on, tokenizer_of
from training.recipes import RECIPES

SHOWN_BAD_ROWS = 3


def load(file: Path, overrides: Sequence[str], *, inline: bool = False, force: bool = False) -> Job:
    """The job in a file, checked against this machine too. Raises InputError with every problem."""
    job = jobs.load(file, overrides)
    machine(job, inline=inline, force=force)
    return job


def machine(job: Job, *, inline: bool, force: bool = False) -> None:
    """Raises InputError if this machine lacks a package or the room that the job needs.
    `force`: room is not looked at."""
    trackers.check(job.track, where=str(job.file))
    local_capacity.check(job, inline=inline, force=force)
    if not force:
        checkpoint_quota.check(job)
    if not force and num_gpus() and (inline or "RAY_ADDRESS" not in os.environ):
        fits_gpus(job, lambda: [hardware.here()])


def fits_gpus(job: Job, where: Callable[[], Sequence[HardwareProfile]]) -> None:
    """Raises InputError if a phase cannot fit on the GPUs of any of some sites, where those are known."""
    refusals = []
    with suppress(UnknownHardware):
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
    located = [source for held_out in (False, True) for source in sources_of(phase, held_out=held_out)]
    local = [source for source in located if not _on_hub(source)]
    notes = [
        f"{source.source.path} is on the hub; its rows are read when the job runs"
        for source in located
        if _on_hub(source)
    ]
    tokenizer = tokenizer_of(phase.model)
    known = model_probe.examined(phase)
    if not notes and os.path.isdir(tokenizer):
        return {"recipe": phase.recipe, **_counts(phase, known)}
    notes += reward_signature.check(phase)
    notes += _of_model(phase, known, 0)
    if not local:
        return {"recipe": phase.recipe, "notes": notes}
    if not os.path.isdir(tokenizer):
        notes.append(f"lengths were not looked at: the tokenizer {tokenizer} is on the hub")
    return {"recipe": phase.recipe, **_parsed_counts(phase, notes), "notes": list(dict.fromkeys(notes))}


def _parsed_counts(phase: Phase, notes: list[str]) -> dict[str, Any]:
    """Counts of the rows that are here, where there is no tokenizer to read them with."""
    from training.data.prepare import check_rows

    rows, formats, forms = 0, Counter[str](), []
    for held_out in (False, True):
        local = [source for source in sources_of(phase, held_out=held_out) if not _on_hub(source)]
        data = data_of(phase, held_out=held_out)
        findings = check_rows(local, data, RECIPES[phase.recipe].formats)
        rows, formats = rows + findings.rows, formats + findings.formats
        forms += _forms(local, findings.source_formats, findings.formats)
        notes += findings.notes
        if findings.bad:
            notes.append(bad_rows_note(findings.bad, findings.rows))
    return {"rows": rows, "formats": dict(formats), "sources": forms}


def _counts(phase: Phase, known: Traits | None) -> dict[str, Any]:
    stores, found = prepare_phase(phase, cache_folder())
    parts = {"train": stores.train, "eval": stores.eval}
    forms = {
        name: _forms(sources_of(phase, held_out=name == "eval"), store.meta.source_formats, store.meta.formats)
        for name, store in parts.items()
        if store is not None
    }
    counts = {
        name: {
            "rows": store.meta.rows,
            "samples": store.meta.kept,
            "tokens": store.meta.tokens,
            "target_tokens": store.meta.target_tokens,
            "longest": store.meta.longest,
            "formats": store.meta.formats,
            "sources": forms[name],
        }
        for name, store in parts.items()
        if store is not None
    }
    located = [source for held_out in (False, True) for source in sources_of(phase, held_out=held_out)]
    notes = without_effect(located) + [
        note for store in parts.values() if store is not None for note in store.meta.notes
    ]
    notes += reward_signature.notes(phase, stores.train)
    notes += found
    notes += vocabulary.notes(phase, stores.train.meta.tokenizer_rows)
    notes += notes_on(phase.model.path)
    longest = min(stores.train.meta.longest, phase.data.max_length) + phase.new_tokens
    notes += _of_model(phase, known, longest)
    bad = {"bad_rows": stores.train.bad_rows(SHOWN_BAD_ROWS)} if stores.train.meta.dropped_bad else {}
    return {**counts, **bad, "notes": list(dict.fromkeys(notes))}


def _forms(
    sources: Sequence[Located], by_source: Sequence[Mapping[str, int]], total: Mapping[str, int]
) -> list[dict[str, Any]]:
    """What was read of each source: its name, kinds of files, and rows by format;
    {} where these were not counted apart."""
    if len(by_source) != len(sources):  # a store that was made before they were
        by_source = [total if len(sources) == 1 else {} for _ in sources]
    return [
        {
            "path": source.shown,
            "kinds": list(dict.fromkeys(part.kind for part in source.parts)),
            "formats": dict(formats),
        }
        for source, formats in zip(sources, by_source, strict=True)
    ]


def _form_line(form: Mapping[str, Any]) -> str:
    """`rows.csv: 8 rows of prompt_completion (CSV)`."""
    rows = " and ".join(f"{count:,} row{'s' * (count != 1)} of {name}" for name, count in form["formats"].items())
    return f"{form['path']}: {rows or 'rows'} ({', '.join(form['kinds'])})"


def _of_model(phase: Phase, known: Traits | None, longest: int) -> list[str]:
    """What goes another way than usual, with samples of at most `longest` tokens (0: not known).
    Raises InputError for what the model cannot do."""
    if known is None:
        return [
            (
                f"{phase.model.path} is no folder here, so it is a model of the hub or of a bucket; what its code can "
                "do is examined when the job runs"
            )
        ]
    device = local_capacity.device_of(phase)
    attention = model_traits.attention_of(phase.model, known, device)
    model_traits.refuse(phase, known, attention, longest)
    return list(model_traits.notes(phase, known, attention, longest))


def _on_hub(source: Located) -> bool:
    return any(isinstance(part, HubSplit) for part in source.parts)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a terminal."""
    for name, phase in report["phases"].items():
        for part in ("train", "eval"):
            if part in phase:
                counts = phase[part]
                yield (
                    f"{name}: {part}: {counts['samples']:,} samples of {counts['rows']:,} rows, {counts['tokens']:,} "
                    f"tokens, {counts['target_tokens']:,} of them targets; the longest has {counts['longest']:,}"
                )
        if "rows" in phase:
            yield f"{name}: {phase['rows']:,} rows"
            yield from (f"{name}: {_form_line(form)}" for form in phase["sources"])
        for part in ("train", "eval"):
            sources = phase[part]["sources"] if part in phase else []
            yield from (f"{name}: {part}: {_form_line(form)}" for form in sources)
        for note in phase["notes"]:
            yield f"{name}: {note}"
        for bad in phase.get("bad_rows", ()):
            yield f"{name}: dropped: {bad['row']}: {bad['reason']}"
    yield f"{report['name']}: ok"
