"""`muster export`: a checkpoint of a run as a plain Hugging Face folder, without workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.cache import cache_folder
from launcher.driver import with_its_start
from launcher.runs import PATIENCE_S, RunFolder, phase_with_checkpoints
from training.checkpoint import CheckpointError, verify
from training.checkpoints import Checkpoints, step_of
from training.errors import InputError
from training.modelfiles import at_hand
from training.storage import Local, Place, place


def export(run: RunFolder, *, phase: str | None, step: int | None, out: str | None, merge: bool) -> dict[str, Any]:
    """Raises InputError for a phase or step that is not there, CheckpointError if no checkpoint is whole."""
    job = run.job()
    name = phase_with_checkpoints(run, phase)
    if merge and job.phases[name].model.lora is None:
        raise InputError.of("--merge", f"{name} trained all weights; there is no adapter to merge")
    folder = _checkpoint(Checkpoints(run.checkpoints(name)), step)
    if out is not None:
        _refuse_to_overwrite(place(out, patience_s=PATIENCE_S))
    target = place(out) if out is not None else run.root / name / f"model-{step_of(folder)}{'-merged' if merge else ''}"
    from training.export import export as write

    start = at_hand(with_its_start(job.phases[name], run), cache_folder())

    try:
        write(folder, target, start, merge=merge)
    except OSError as error:
        raise InputError.of(str(target), f"cannot be written: {error}; make room, or choose another --out") from error
    return {"phase": name, "step": step_of(folder), "model": str(target)}


def _refuse_to_overwrite(out: Place) -> None:
    if isinstance(out, Local) and out.path.is_file():
        raise InputError.of(str(out), "is a file; choose another --out")
    if out.children():
        raise InputError.of(str(out), "the folder is not empty; choose another --out, or remove it first")


def _checkpoint(checkpoints: Checkpoints, step: int | None) -> Place:
    if step is not None:
        try:
            folder = checkpoints.at(step)
        except CheckpointError as error:
            raise InputError.of("", str(error)) from error
        if wrong := verify(folder):
            raise CheckpointError("\n".join(wrong))
        return folder
    newest, findings = checkpoints.newest_whole()
    if newest is None:
        raise CheckpointError("\n".join([f"{checkpoints.root}: no whole checkpoint", *findings]))
    return newest


def lines(done: Mapping[str, Any]) -> Iterator[str]:
    yield f"{done['phase']} step {done['step']}: model in {done['model']}"
