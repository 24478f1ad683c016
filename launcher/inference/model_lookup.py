"""Finds the model that the user names: a folder, the result of a run, or a checkpoint, which is first exported to
a folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from launcher.inference import export
from launcher.process.terminal import printable
from launcher.runfolder.cache import cache_folder
from launcher.runfolder.run_folder import JOB, METRICS, PATIENCE_S, RunFolder, find, told_as_input
from training import model_folder as modelfiles
from training.checkpoint.format import MANIFEST
from training.checkpoint.repository import Checkpoints, step_of
from training.errors import InputError
from training.io.paths import absolute
from training.recipes import RECIPES
from training.storage import StoragePath, is_remote, local_copy, open_storage

_CHECKPOINT = re.compile(r"(.*)/([^/]+)/checkpoints/step-(\d+)")


def warn(text: str) -> None:
    """Beside the result."""
    print(printable(text), file=sys.stderr, flush=True)


class Found(NamedTuple):
    folder: str
    """Where it can be loaded from."""
    name: str
    """What it is: the folder itself, or the checkpoint that it was written from."""


class _Meant(NamedTuple):
    run: str
    phase: str | None
    step: int | None


def model_folder(text: str, *, rewards: bool = False, trust_remote_code: bool = False) -> str:
    """The Hugging Face folder that is meant. Raises InputError if there is none, or of the wrong kind."""
    return found(text, rewards=rewards, trust_remote_code=trust_remote_code).folder


def found(
    text: str,
    *,
    phase: str | None = None,
    step: int | None = None,
    rewards: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = warn,
) -> Found:
    """The model that is meant: a folder, the newest of a run or of one of its phases (RUN/PHASE),
    a checkpoint (its folder, or `step`).

    Of a run that has no model yet its newest whole checkpoint. `rewards`: a reward model will do.

    Raises InputError if there is none, or of the wrong kind, or one
    with Python code of its own without `trust_remote_code`.
    """
    text = os.path.expanduser(text)  # `--against ~/model` is expanded by the shell, `--against=~/model` is not
    folder = _folder(text)
    if folder is not None:
        if phase is not None or step is not None:
            option = "--step" if step is not None else "--phase"
            raise InputError.of(option, f"needs a run; {text} is the folder of a model")
        modelfiles.fetch_base(str(folder))
        modelfiles.inspect(folder, classifier=rewards, trust_remote_code=trust_remote_code)
        return Found(str(folder), str(folder))
    meant = _meant(text)
    for option, asked, said in (("--phase", phase, meant.phase), ("--step", step, meant.step)):
        if None not in (asked, said) and asked != said:
            raise InputError.of(option, f"got {asked}, but {text} says {said}; omit one of them")
    run, phase, step = find(meant.run), phase or meant.phase, step if step is not None else meant.step
    if phase is not None and phase not in (phases := run.job().phases):
        raise InputError.of(run.address, f"no phase {phase}; there are: {', '.join(phases)}")
    newest = _newest_model(run, phase) if step is None else None
    if newest is None:
        return _checkpoint(run, phase, step, rewards, trust_remote_code, say)
    local = local_copy(newest, cache_folder())
    modelfiles.fetch_base(str(local))
    modelfiles.inspect(local, classifier=rewards, trust_remote_code=trust_remote_code)
    return Found(str(local), str(newest))


def _folder(text: str) -> Path | None:
    """The text as the folder of a model; a copy of it if it is in a bucket. None if it must be something of a run."""
    if not is_remote(text):
        folder = Path(text)
        return folder if (folder / "config.json").exists() or modelfiles.is_adapter(folder) else None
    remote = open_storage(text, patience_s=PATIENCE_S)
    with told_as_input(text):
        holds_model = {"config.json", modelfiles.ADAPTER_CONFIG} & remote.children().keys()
        return local_copy(remote, cache_folder()) if holds_model else None


def _meant(text: str) -> _Meant:
    """A run, RUN/PHASE, or the folder of a checkpoint."""
    if not is_remote(text) and ".." in Path(text).parts:
        text = absolute(text)
    address = text.rstrip("/") if is_remote(text) else str(Path(text).absolute())
    if checkpoint := _CHECKPOINT.fullmatch(address):
        run, phase, step = checkpoint.groups()
        if not is_remote(text) and not (Path(run) / JOB).exists():
            message = (
                f"the checkpoint of a run that is not there: {run} has no job.yaml, which says what model it is of"
            )
            raise InputError.of(text, f"{message}; put it back into its run, or export it there")
        return _Meant(_short(text, 3), phase, int(step))
    folder = Path(text)
    if is_remote(text) or not folder.is_dir() or (folder / JOB).exists():
        return _Meant(text, None, None)
    if (folder / MANIFEST).exists():
        raise InputError.of(text, "a checkpoint outside its run; expected RUN/PHASE/checkpoints/step-00000100")
    if (folder.absolute().parent / JOB).exists() and (folder / METRICS).exists():
        return _Meant(_short(text, 1), folder.absolute().name, None)
    message = "neither a run nor a model folder (no job.yaml, no config.json, no adapter_config.json)"
    raise InputError.of(text, message)


def _short(text: str, levels: int) -> str:
    """The address so many levels above one, as a person would write it."""
    if is_remote(text):
        return text.rstrip("/").rsplit("/", levels)[0]
    path = Path(text)
    return str(path.parents[levels - 1] if len(path.parts) > levels else path.absolute().parents[levels - 1])


def _newest_model(run: RunFolder, only: str | None) -> StoragePath | None:
    for phase in reversed(run.job().phases) if only is None else (only,):
        inside = [name for name, size in (run.root / phase).children().items() if size is None]
        if models := [name for name in inside if name == "model" or name.startswith("model-")]:
            return run.root / phase / max(models, key=_step)
    return None


def _step(name: str) -> float:
    """Of a model that `muster export` wrote from a checkpoint; the model of the end comes after all of them."""
    step = name.removeprefix("model-")
    return int(step) if step.isdigit() else float("inf") if name == "model" else -1


def _checkpoint(
    run: RunFolder,
    phase: str | None,
    step: int | None,
    rewards: bool,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> Found:
    """A checkpoint as a folder in the cache."""
    phases = run.job().phases
    writes = [name for name in phases if rewards or not RECIPES[phases[name].recipe].is_classifier]
    if phase is not None and phase not in writes:
        raise InputError.of(run.address, f"phase {phase} trains a reward model, which generates no text")
    saved = [name for name in writes if phase in (None, name) and Checkpoints(run.checkpoints(name)).folders()]
    if not saved and step is None:
        what = "run" if phase is None else f"phase {phase}"
        raise InputError.of(run.address, f"the {what} has no model and no checkpoint yet")
    name = saved[-1] if saved else phase or writes[-1]
    checkpoint = export.chosen(run, name, step)
    if step is None:
        say(
            f"{run.address}: no model yet; this is its newest whole checkpoint, of step {step_of(checkpoint)} of {name}"
        )
    folder = export.in_cache(run, name, checkpoint, say, trust_remote_code=trust_remote_code)
    modelfiles.fetch_base(str(folder))
    modelfiles.inspect(folder, classifier=rewards, trust_remote_code=trust_remote_code)
    return Found(str(folder), str(checkpoint))
