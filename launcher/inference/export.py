"""`muster export`: a checkpoint of a run as a plain Hugging Face folder, without workers;
also in the cache, to be tried."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.driver.driver import with_its_start
from launcher.process import output
from launcher.runfolder.cache import cache_folder
from launcher.runfolder.run_folder import PATIENCE_S, RunFolder, phase_with_checkpoints
from training.checkpoint.format import MANIFEST, CheckpointError, verify
from training.checkpoint.repository import Checkpoints, step_of
from training.config import Model
from training.errors import InputError
from training.io.owned_folders import temporary_folder
from training.model_folder import at_hand, code_in
from training.storage import Local, StoragePath, open_storage


@output.kept_going()
def export(
    run: RunFolder,
    *,
    phase: str | None,
    step: int | None,
    out: str | None,
    merge: bool,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Raises InputError for a phase or step that is not there, and for Python code of the model without
    `trust_remote_code`; CheckpointError if no checkpoint is whole."""
    job = run.job()
    name = phase_with_checkpoints(run, phase)
    if merge and job.phases[name].model.lora is None:
        raise InputError.of("--merge", f"{name} trained all weights; there is no adapter to merge")
    folder = _checkpoint(Checkpoints(run.checkpoints(name)), step)
    if out is not None:
        _refuse_to_overwrite(open_storage(out, patience_s=PATIENCE_S))
    target = (
        open_storage(out)
        if out is not None
        else run.root / name / f"model-{step_of(folder)}{'-merged' if merge else ''}"
    )
    advice = "free some space, or choose a different --out"
    _write(run, name, folder, target, advice, merge=merge, trust_remote_code=trust_remote_code)
    return {"phase": name, "step": step_of(folder), "model": str(target)}


def chosen(run: RunFolder, phase: str, step: int | None) -> StoragePath:
    """The whole checkpoint of a step, or the newest. What was written into the cache was whole.
    Raises as `export` does."""
    checkpoints = Checkpoints(run.checkpoints(phase))
    at_once = _found(checkpoints, step) if step is not None else checkpoints.folders()[-1]
    return at_once if (kept := _kept(at_once)) is not None and kept.exists() else _checkpoint(checkpoints, step)


def in_cache(
    run: RunFolder, phase: str, checkpoint: StoragePath, say: Callable[[str], None], *, trust_remote_code: bool = False
) -> Path:
    """The model of a whole checkpoint as a folder in the cache, written there once. Raises as `export` does."""
    kept = _kept(checkpoint)
    assert kept is not None, "a whole checkpoint has a manifest"
    if kept.exists():
        return kept
    say(f"{checkpoint}: written as a model to {kept}")
    advice = "free some space, or set MUSTER_CACHE to a different folder"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(".tmp-", str(kept.parent)) as beside:
            written = beside / "model"
            _write(run, phase, checkpoint, Local(written), advice, trust_remote_code=trust_remote_code)
            if not kept.exists():  # else another process was faster
                written.rename(kept)
    except OSError as error:
        raise InputError.of(str(kept), f"cannot be written: {error.strerror}; {advice}") from error
    return kept


def _kept(checkpoint: StoragePath) -> Path | None:
    """Where the model of a checkpoint is kept, by what is in it; None if it has no manifest."""
    try:
        content = (checkpoint / MANIFEST).read()
    except OSError:
        return None
    address = str(checkpoint.path.resolve()) if isinstance(checkpoint, Local) else checkpoint.address
    name = hashlib.sha256(address.encode() + content).hexdigest()[:16]
    return cache_folder() / "checkpoints" / f"{checkpoint.name}-{name}"


def _write(
    run: RunFolder,
    phase: str,
    checkpoint: StoragePath,
    target: StoragePath,
    advice: str,
    *,
    merge: bool = False,
    trust_remote_code: bool,
) -> None:
    start = at_hand(with_its_start(run.job().phases[phase], run), cache_folder())
    start = start.model_copy(update={"model": _as_trusted(start.model, run.address, trust_remote_code)})
    from training.checkpoint.export import export as write

    try:
        write(checkpoint, target, start, merge=merge)
    except OSError as error:
        raise InputError.of(str(target), f"cannot be written: {error}; {advice}") from error


def _as_trusted(model: Model, run: str, trust_remote_code: bool) -> Model:
    """The model of a run for somebody who need not have written its job: its own Python code runs
    only with their consent.

    Raises InputError if it has some and there is none.
    """
    if not code_in(model):
        return model.model_copy(update={"trust_remote_code": False})
    if not trust_remote_code:
        message = (
            f"{model.path} brings Python code of its own (`auto_map`), which would run here; if you trust it, give "
            "--trust-remote-code"
        )
        raise InputError.of(run, message)
    return model


def _refuse_to_overwrite(out: StoragePath) -> None:
    if isinstance(out, Local) and out.path.is_file():
        raise InputError.of(str(out), "is a file; choose another --out")
    if out.children():
        raise InputError.of(str(out), "the folder is not empty; choose another --out, or remove it first")


def _found(checkpoints: Checkpoints, step: int) -> StoragePath:
    try:
        return checkpoints.at(step)
    except CheckpointError as error:
        raise InputError.of("", str(error)) from error


def _checkpoint(checkpoints: Checkpoints, step: int | None) -> StoragePath:
    if step is not None:
        folder = _found(checkpoints, step)
        if wrong := verify(folder):
            raise CheckpointError("\n".join(wrong))
        return folder
    newest, findings = checkpoints.newest_whole()
    if newest is None:
        raise CheckpointError("\n".join([f"{checkpoints.root}: no whole checkpoint", *findings]))
    return newest


def lines(done: Mapping[str, Any]) -> Iterator[str]:
    yield f"{done['phase']} step {done['step']}: model in {done['model']}"
