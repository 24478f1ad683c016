"""Builds the bundle that is uploaded with a job: Muster's packages, the resolved job, and the small local files that it
names. It has no hidden files, of data folders only the files that are read, and no links that lead out of a folder.

launcher/ training/ cluster/                  so that the cluster runs the Muster of this machine
submitted/job.yaml                            paths of what is carried are relative to it
submitted/inputs/DIGEST/NAME                  by content: the same input has the same path in every submission
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import launcher
from launcher.jobfile import job as jobs
from launcher.jobfile.job import Job
from launcher.workers.unpack_inputs import FOLDER, INPUTS, JOB
from training.config import Data, Phase, Source
from training.data import files
from training.data.files import DataFile
from training.data.saved_datasets import SPLITS, STATE
from training.errors import InputError, Problem
from training.recipes import RECIPES

LIMIT = 90 << 20
"""Bytes. Ray accepts 100 MiB, compressed."""
PACKAGES = ("launcher", "training", "cluster")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Timestamp of every file in the bundle: equal contents then give an equal bundle, which is uploaded once."""


@dataclass
class _Inputs:
    """Local files and folders that are uploaded."""

    shared: Sequence[str]
    """Folders that the cluster can access under the same path."""
    files: dict[str, Path] = field(default_factory=dict)
    """Files by their name in the bundle."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each named path."""
    problems: list[Problem] = field(default_factory=list)
    """Problems of files that cannot be uploaded."""

    def carried(self, path: str) -> str:
        """Return the path in the bundle of a local file or folder; any other text unchanged."""
        given = Path(path)
        if not self._goes_along(path) or not given.exists():
            return path
        if given.is_file():
            return self._add(path, given.name, {given.name: given})
        return self._add(path, given.name, self._own(given, _below(given)))

    def data(self, source: Source, *, documents: bool = False, split: str = "") -> str:
        """Do the same for data: only the files of a folder or glob that are read. Arguments as of `files.expand`."""
        if not self._goes_along(source.path):
            return source.path
        (located,) = files.expand([source], Path("/"), documents=documents, split=split)
        found = [Path(part.path) for part in located.parts if isinstance(part, DataFile)]
        given = Path(source.path)
        if given.is_file():
            return self._add(source.path, given.name, {given.name: given})
        if given.is_dir():
            described = [given / STATE, given / SPLITS, *(file.parent / STATE for file in found)]
            there = sorted({*found, *(file for file in described if file.is_file())})
            return self._add(source.path, given.name, self._own(given, there))
        self._own(_before_magic(given), found)
        return self._add(source.path, "files", {f"{i:05}-{file.name}": file for i, file in enumerate(found)})

    def _goes_along(self, path: str) -> bool:
        return os.path.isabs(path) and not any(Path(path).is_relative_to(folder) for folder in self.shared)

    def _own(self, folder: Path, found: Iterable[Path]) -> dict[str, Path]:
        """Return files by their path in a folder. Links that lead out of it become problems."""
        own: dict[str, Path] = {}
        for file in found:
            if _leads_out(file, folder):
                message = (
                    f"is a link to {os.path.realpath(file)}, which is not a file in {folder}, so it is not uploaded; "
                    "replace it by a copy, or remove it"
                )
                self.problems.append(Problem(str(file), "", message))
            else:
                own[str(file.relative_to(folder))] = file
        return own

    def _add(self, path: str, name: str, files: dict[str, Path]) -> str:
        place = f"{INPUTS}/{_digest(files)}"
        self.sizes[path] = sum(file.stat().st_size for file in files.values())
        inside = place if Path(path).is_file() else f"{place}/{name}"
        self.files |= {f"{inside}/{inner}": file for inner, file in files.items()}
        return f"./{place}/{name}"


def _below(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted, without hidden files and __pycache__;
    links to folders are listed like files."""
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (name.startswith(".") or name == "__pycache__")]
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in (*names, *links):
            path = Path(here, name)
            if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                yield path


def _leads_out(file: Path, folder: Path) -> bool:
    """Return whether a path in a folder resolves to a file outside. The links of a snapshot in the Hugging Face cache
    to the blobs beside it are allowed."""
    target, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if target.is_file() and target.is_relative_to(root):
        return False
    return not (target.is_file() and root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs")


def _before_magic(pattern: Path) -> Path:
    """Return the folder above all matches of a glob."""
    parts = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    return Path(*parts)


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in files.items():
        with file.open("rb") as content:
            digest.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def write(job: Job, storage: str, shared: Sequence[str], file: Path) -> None:
    """Write the bundle of a job whose runs are stored in `storage`. Raises InputError for local files that
    are too large, and for links that lead out of the folders that the job names."""
    inputs = _Inputs(shared)
    phases = {name: _carried(phase, inputs) for name, phase in job.phases.items()}
    if inputs.problems:
        raise InputError(list(dict.fromkeys(inputs.problems)))
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
    return {
        str(file.relative_to(root)): file for package in PACKAGES for file in _below(root / package) if file.is_file()
    }


def _check_sizes(sizes: dict[str, int]) -> None:
    if sum(sizes.values()) <= LIMIT:
        return
    advice = (
        "upload it and set its address (s3://...), or put it into a folder that the cluster can access (`shared` "
        "in the cluster file)"
    )
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    rest, problems = sum(sizes.values()), []
    for path, size in largest:
        if rest > LIMIT:
            problems.append(
                Problem(
                    path,
                    "",
                    f"{size / 2**20:,.0f} MiB are too much to upload with a job ({LIMIT >> 20} MiB in total); {advice}",
                )
            )
        rest -= size
    raise InputError(problems)


# Every path that a phase can name


def _carried(phase: Phase, inputs: _Inputs) -> Phase:
    carried = inputs.carried
    changes: dict[str, Any] = {"data": _data(phase, inputs)}
    model = {"path": carried(phase.model.path)}
    if phase.model.tokenizer is not None:
        model["tokenizer"] = carried(phase.model.tokenizer)
    changes["model"] = phase.model.model_copy(update=model)
    if phase.from_ is not None:
        changes["from_"] = carried(phase.from_)
    if phase.eval is not None:
        asked = {"data": _sources(phase.eval.data, inputs.data)}
        if phase.eval.verdicts is not None:
            asked["verdicts"] = _sources(phase.eval.verdicts, inputs.data)
        changes["eval"] = phase.eval.model_copy(update=asked)
    rewards = [
        source.model_copy(update={"path": _reward(source.path, carried), "folder": None}) for source in phase.rewards
    ]
    named = {key: carried(path) for key, path in phase.named_models.items()}
    return phase.model_copy(update=changes).with_models(named, rewards)


def _data(phase: Phase, inputs: _Inputs) -> Data:
    read = partial(inputs.data, documents=RECIPES[phase.recipe].reads_documents)
    data = phase.data
    update = {"train": _sources(data.train, partial(read, split="train")), "template": inputs.carried(data.template)}
    if data.eval is not None:
        update["eval"] = _sources(data.eval, read)
    return data.model_copy(update=update)


def _sources(given: Any, carried: Callable[[Source], str]) -> Any:
    if isinstance(given, list):
        return [_sources(source, carried) for source in given]
    if isinstance(given, Source):
        return given.model_copy(update={"path": carried(given)})
    return carried(Source(path=given))


def _reward(path: str, carried: Callable[[str], str]) -> str:
    """Return the path of a reward in the bundle; it may be a function in a file: /folder/mine.py:score."""
    file, colon, name = path.rpartition(":")
    return f"{carried(file)}:{name}" if colon and os.path.isabs(file) else carried(path)
