"""Finds the checkpoint to go on from and restores it on the workers, who check what they read between them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from training.checkpoint.format import CheckpointError, Manifest, NewerFormat
from training.checkpoint.repository import step_of
from training.data.formats import BOS, CHANGES
from training.drivers.hooks import Hooks
from training.errors import InputError
from training.group import Group, results_of
from training.phase_info import PhaseInfo
from training.storage import StoragePath

SETUP_S = 3600.0
"""Longest time for loading a model or a checkpoint, or for an evaluation."""


def resume(learners: Mapping[str, Group], hooks: Hooks, info: PhaseInfo) -> Manifest | None:
    """Restore the checkpoint that the run asks for, or the newest whole one;
    returns its manifest, None if there is none.

    Raises InputError if a worker cannot write checkpoints, or the one to go on from was trained on another job or other
    data; CheckpointError if there are checkpoints and none is whole.
    """
    _refuse_unwritable(learners, hooks)
    candidates = _candidates(hooks)
    for folder in candidates:
        found = _restored(learners, hooks, info, folder)
        if isinstance(found, Manifest):
            return found
        for finding in found:
            hooks.event("checkpoint_damaged", finding=finding)
    if candidates or (hooks.resume_at is None and hooks.checkpoints.folders()):
        raise CheckpointError(_nothing_to_resume(hooks))
    _set_aside(hooks, after=0)
    return None


def _nothing_to_resume(hooks: Hooks) -> str:
    which = "no checkpoint is" if hooks.resume_at is None else f"the checkpoint of step {hooks.resume_at} is not"
    checkpoints = hooks.checkpoints
    left = [str(step_of(folder)) for folder in checkpoints.folders() if folder not in checkpoints.resumable()]
    light = (
        f"; those with weights alone ({', '.join(left)}; checkpoint.keep_weights) cannot be resumed, `muster export` "
        "writes their models"
        if left
        else ""
    )
    return f"{checkpoints.root}: {which} whole{light}; remove the folder to begin again"


def _refuse_unwritable(learners: Mapping[str, Group], hooks: Hooks) -> None:
    """Now, not at the first save, hours later."""
    if problems := _complaints(learners, "cannot_save_to", str(hooks.checkpoints.staging)):
        advice = "`storage` must be a folder that all machines share, or a bucket (s3://, gs://) that all may write"
        raise InputError.of("storage", "\n".join([*problems, advice]))


def _complaints(learners: Mapping[str, Group], method: str, address: str) -> list[str]:
    """What the workers of all roles say is wrong, each thing once."""
    answers = results_of(learners, method, address, timeout_s=SETUP_S).values()
    return list(dict.fromkeys(answer for of_role in answers for answer in of_role if answer))


def _candidates(hooks: Hooks) -> list[StoragePath]:
    """What may be gone on from, the likeliest first. Raises CheckpointError if the one
    that is asked for is not there."""
    if hooks.resume_at is None:
        return hooks.checkpoints.resumable()[::-1]
    return [hooks.checkpoints.at(hooks.resume_at)] if hooks.resume_at else []


def _restored(
    learners: Mapping[str, Group], hooks: Hooks, info: PhaseInfo, folder: StoragePath
) -> Manifest | list[str]:
    """The manifest of the checkpoint that the workers now go on from, or the damage that was found."""
    try:
        manifest = Manifest.read(folder)
    except NewerFormat:
        raise
    except CheckpointError as error:
        return [str(error)]
    if manifest.attempt >= hooks.accepted_before:
        _refuse_change(folder, manifest, hooks, info)
    began = time.monotonic()
    if findings := _complaints(learners, "restore", str(folder)):
        return findings
    results_of(learners, "publish", timeout_s=SETUP_S)
    _set_aside(hooks, after=manifest.step)
    seconds = round(time.monotonic() - began, 3)
    hooks.event("restored", step=manifest.step, checkpoint=str(folder), seconds=seconds)
    return manifest


def _set_aside(hooks: Hooks, after: int) -> None:
    """What lies after the step to go on from is damaged, or not wanted: its steps are done again."""
    for folder in hooks.checkpoints.folders():
        if step_of(folder) > after:
            hooks.checkpoints.set_aside(folder)
            hooks.event("checkpoint_set_aside", step=step_of(folder))


def _refuse_change(folder: StoragePath, manifest: Manifest, hooks: Hooks, info: PhaseInfo) -> None:
    changes = []
    if manifest.job_hash not in (hooks.job_hash, hooks.job_hash_before):
        changes.append("it belongs to another job: a setting that shapes the curve is another one")
    if manifest.data_hash != info.data_hash and manifest.data_hash == info.data_hash_before:
        changes.append(_what_changed(info.data_changes))
    elif manifest.data_hash != info.data_hash:
        changes.append("it was trained on other data: the rows, the tokenizer or the template have changed since")
    stops = info.stop_tokens_before if manifest.stop_tokens is None else tuple(manifest.stop_tokens)
    if set(stops) != set(info.stop_tokens):
        changes.append(
            f"its responses ended at the tokens {_listed(stops)}, now they end at {_listed(info.stop_tokens)}: the "
            "end of a turn that the chat template writes is one of these, also where it is not the tokenizer's EOS"
        )
    if manifest.dtype != info.dtype:
        changes.append(
            f"it was computed in {manifest.dtype}, these workers would go on in {info.dtype}; set model.dtype"
        )
    if changes:
        advice = (
            "bring back what it was, begin a run under another name, or go on all the same: muster resume RUN "
            "--accept-changes"
        )
        raise InputError.of(str(folder), "\n  ".join([*changes, advice]))


def _listed(tokens: tuple[int, ...]) -> str:
    return ", ".join(map(str, tokens)) or "none"


def _what_changed(names: tuple[str, ...]) -> str:
    """Why rows have other tokens than in an earlier version, and how they get the old ones, if there is a way."""
    if names == (BOS,):
        return (
            "the tokenizer puts BOS before plain texts, which is now learnt; data.bos: none goes on with the old "
            "tokens: muster resume RUN phases.PHASE.data.bos=none"
        )
    read = "; ".join(CHANGES[name] for name in names)
    return f"it was trained by a version of Muster that read these rows differently; now {read}"
