"""What a job takes along to a cluster: Muster's own packages, the resolved job, and the small local files that it names. Nothing else.

launcher/ training/ cluster/                  so that the cluster runs the Muster of this machine
submitted/job.yaml                            paths of what is carried are relative to it
submitted/inputs/DIGEST/NAME                  by content: the same input has the same path in every submission
"""

from __future__ import annotations

import glob
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import launcher
from launcher import job as jobs
from launcher.job import Job
from launcher.landing import FOLDER, INPUTS, JOB
from training.config import PPO, Data, Phase, Source
from training.errors import InputError, Problem
from training.storage import is_remote

LIMIT = 90 << 20
"""Bytes. Ray takes 100 MiB, packed."""
PACKAGES = ("launcher", "training", "cluster")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Of every file in the bundle: equal contents are then an equal bundle, which is not sent twice."""


@dataclass
class _Inputs:
    """Local files and folders that go along."""

    shared: Sequence[str]
    """Folders that the cluster sees as they are."""
    files: dict[str, Path] = field(default_factory=dict)
    """By name in the bundle."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of what was named."""

    def carried(self, path: str) -> str:
        """The path of a local file, folder or glob for the job in the bundle; any other text as it is."""
        if not os.path.isabs(path) or any(Path(path).is_relative_to(folder) for folder in self.shared):
            return path
        given = Path(path)
        if given.is_dir():
            name, files = given.name, {str(file.relative_to(given)): file for file in _below(given)}
        elif given.is_file():
            name, files = given.name, {given.name: given}
        else:
            found = sorted(glob.glob(path, recursive=True))
            name, files = "files", {f"{i:05}-{Path(file).name}": Path(file) for i, file in enumerate(found)}
        place = f"{INPUTS}/{_digest(files)}"
        self.sizes[path] = sum(file.stat().st_size for file in files.values())
        inside = place if given.is_file() else f"{place}/{name}"
        self.files |= {f"{inside}/{inner}": file for inner, file in files.items()}
        return f"./{place}/{name}"


def _below(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in files.items():
        with file.open("rb") as content:
            digest.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def write(job: Job, storage: str, shared: Sequence[str], file: Path) -> None:
    """Write the bundle of a job whose runs are kept in `storage`. Raises InputError if its local files are too large."""
    inputs = _Inputs(shared)
    phases = {name: _carried(phase, inputs.carried) for name, phase in job.phases.items()}
    _check_sizes(inputs.sizes)
    text = jobs.dump(replace(job, storage=storage, phases=phases))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, path in sorted({**_packages(), **{f"{FOLDER}/{k}": v for k, v in inputs.files.items()}}.items()):
            bundle.writestr(_entry(name), path.read_bytes())
        bundle.writestr(_entry(f"{FOLDER}/{JOB}"), text)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def _packages() -> dict[str, Path]:
    root = Path(launcher.__file__).parent.parent
    return {str(file.relative_to(root)): file for package in PACKAGES for file in _below(root / package)}


def _check_sizes(sizes: dict[str, int]) -> None:
    if sum(sizes.values()) <= LIMIT:
        return
    advice = "upload it to storage and name its address (s3://...), or put it into a folder that the cluster sees (`shared` in the cluster file)"
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    rest, problems = sum(sizes.values()), []
    for path, size in largest:
        if rest > LIMIT:
            problems.append(Problem(path, "", f"{size / 2**20:,.0f} MiB are too much to go along with a job ({LIMIT >> 20} MiB in all); {advice}"))  # fmt: skip
        rest -= size
    raise InputError(problems)


# Every path that a phase can name


def _carried(phase: Phase, carried: Callable[[str], str]) -> Phase:
    changes: dict[str, Any] = {"data": _data(phase.data, carried)}
    model = {"path": carried(phase.model.path)}
    if phase.model.tokenizer is not None:
        model["tokenizer"] = carried(phase.model.tokenizer)
    changes["model"] = phase.model.model_copy(update=model)
    if phase.from_ is not None:
        changes["from_"] = carried(phase.from_)
    if phase.eval is not None:
        asked = {"data": _sources(phase.eval.data, carried)}
        if phase.eval.verdicts is not None:
            asked["verdicts"] = _sources(phase.eval.verdicts, carried)
        changes["eval"] = phase.eval.model_copy(update=asked)
    if isinstance(phase, PPO):
        changes["reward"] = [
            source.model_copy(update={"path": _reward(source.path, carried), "folder": None})
            for source in phase.rewards
        ]
        if phase.critic is not None:
            changes["critic"] = carried(phase.critic)
    return phase.model_copy(update=changes)


def _data(data: Data, carried: Callable[[str], str]) -> Data:
    update = {"train": _sources(data.train, carried), "template": carried(data.template)}
    if data.eval is not None:
        update["eval"] = _sources(data.eval, carried)
    return data.model_copy(update=update)


def _sources(given: Any, carried: Callable[[str], str]) -> Any:
    if isinstance(given, list):
        return [_sources(source, carried) for source in given]
    if isinstance(given, Source):
        return given.model_copy(update={"path": carried(given.path)})
    return given if is_remote(given) else carried(given)


def _reward(path: str, carried: Callable[[str], str]) -> str:
    """A reward may be a function in a file: /folder/mine.py:score."""
    file, colon, name = path.rpartition(":")
    return f"{carried(file)}:{name}" if colon and os.path.isabs(file) else carried(path)
