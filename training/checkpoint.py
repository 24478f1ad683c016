"""Checkpoints: a folder of shards, one a worker, and a manifest written last. No manifest, no checkpoint.

A shard is a safetensors file of stretches of parameters in fp32, `fp32/NAME@START` and its moments `exp_avg/NAME@START`,
[count] each. It does not say which worker or ZeRO stage wrote it, so any number of workers at any stage can read what
they need: a reader asks for elements a..b of a parameter and gets them from wherever they are.

Knows files and tensors, never DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import MusterError

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 8 << 20


class CheckpointError(MusterError):
    """A checkpoint cannot be read: what is wrong with it, one finding a line."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, readable by people."""

    phase: str
    step: int
    samples: int
    """Position in the data: samples trained on."""
    optimizer_step: int
    attempt: int
    world_size: int
    zero_stage: int
    dtype: str
    formats: dict[str, int]
    """Rows of the training data, by format."""
    job_hash: str
    data_hash: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Evaluation at this step, if there was one."""
    parameters: dict[str, list[int]]
    """Shape of every trained parameter."""
    files: list[File]
    versions: dict[str, str]
    created: str
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError when it is missing, cut, or of a newer format."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text())
            if raw.get("format", 0) > FORMAT:
                raise CheckpointError(
                    f"{path}: written by a newer Muster (format {raw['format']}); this one reads {FORMAT}"
                )
            return cls(**{**raw, "files": [File(**entry) for entry in raw["files"]]})
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no {MANIFEST}: the checkpoint was never finished") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a readable manifest ({error})") from None


# -- writing ------------------------------------------------------------------------------------------------------------


def write_shard(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> File:
    """Write fp32 arrays as one safetensors file, flushed to the disk."""
    tensors = list(tensors)
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors:
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in _blocks([len(text).to_bytes(8, "little") + text], tensors):
            digest.update(block)
            size += _write_all(file, block)
        os.fsync(file.fileno())
    return File(path.name, size, digest.hexdigest())


def _blocks(first: list[bytes], tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[memoryview]:
    for data in first:
        yield memoryview(data)
    for _, array in tensors:
        view = np.ascontiguousarray(array, dtype=np.float32).data.cast("B")
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]


def _write_all(file: Any, block: memoryview) -> int:
    done = 0
    while done < len(block):
        done += file.write(block[done:])
    return done


class Checkpoints:
    """The checkpoints of one phase of a run, in one folder. One process commits; workers write shards."""

    def __init__(self, root: Path, *, attempt: int = 1):
        self.root = root
        self.attempt = attempt

    def stage(self, step: int) -> Path:
        """An empty folder to write the shards of a step into; not a checkpoint until it is committed."""
        folder = self.root / f".tmp-{_name(step)}.attempt-{self.attempt}"
        self.discard(folder)
        folder.mkdir(parents=True)
        return folder

    def discard(self, staged: Path) -> None:
        """Remove a staged folder that will not be committed."""
        shutil.rmtree(staged, ignore_errors=True)

    def commit(self, staged: Path, manifest: Manifest) -> Path:
        """Write the manifest and give the folder its name, in one atomic step. Replaces an older one of the same step.

        Raises CheckpointError if a shard is not there: written by a machine that does not share this folder.
        """
        for shard in manifest.files:
            if wrong := _wrong_with(staged, shard, deep=False):
                raise CheckpointError(
                    f"{staged / shard.name}: {wrong}; `storage` must be a folder that all machines share"
                )
        text = json.dumps(asdict(manifest), indent=1)
        with (staged / MANIFEST).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(staged)
        final = self.root / _name(manifest.step)
        if final.exists():
            _remove(final)
        staged.rename(final)
        _sync(self.root)
        return final

    def folders(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(path for path in self.root.glob("step-*") if path.is_dir())

    def at(self, step: int) -> Path:
        """The checkpoint of a step. Raises CheckpointError that lists those that exist."""
        folder = self.root / _name(step)
        if not folder.is_dir():
            steps = ", ".join(str(step_of(path)) for path in self.folders()) or "none"
            raise CheckpointError(f"{self.root}: no checkpoint of step {step}; there are: {steps}")
        return folder

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every byte is as written, and what was wrong with newer ones."""
        findings: list[str] = []
        for folder in reversed(self.folders()):
            wrong = verify(folder)
            if not wrong:
                return folder, findings
            findings += wrong
        return None, findings

    def retain(self, keep: int, best: str | None = None, *, smaller_is_better: bool = True) -> list[Path]:
        """Delete all but the newest `keep` and the best by metric `best`; returns what was deleted."""
        folders = self.folders()
        kept = set(folders[-keep:])
        if best is not None and (winner := self.best(best, smaller_is_better=smaller_is_better)) is not None:
            kept.add(winner)
        gone = [folder for folder in folders if folder not in kept]
        for folder in gone:
            _remove(folder)
        return gone

    def set_aside(self, after: int) -> None:
        """Take checkpoints of later steps out of the count: a resumed run passed over them and does their steps again."""
        for folder in self.folders():
            if step_of(folder) > after:
                target = folder.with_name(f"damaged-{folder.name}.attempt-{self.attempt}")
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)

    def best(self, metric: str, *, smaller_is_better: bool = True) -> Path | None:
        """The checkpoint with the best value of an evaluation metric; the earliest of equals."""
        scored = []
        for folder in self.folders():
            try:
                value = Manifest.read(folder).metrics.get(metric)
            except CheckpointError:
                continue
            if value is not None:
                scored.append((value if smaller_is_better else -value, folder))
        return min(scored)[1] if scored else None

    def sweep(self) -> None:
        """Remove what interrupted saves and deletions left behind."""
        for leftover in [*self.root.glob(".tmp-*"), *self.root.glob(".old-*")]:
            shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Away from its name first: a deletion that is cut short must not leave a checkpoint with holes."""
    doomed = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ------------------------------------------------------------------------------------------------------------


def verify(folder: Path, *, deep: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one finding each; empty if every byte is as it was written.

    Not `deep`: files and sizes alone, without reading the content.
    """
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return [str(error)]
    return [f"{folder / file.name}: {wrong}" for file in manifest.files if (wrong := _wrong_with(folder, file, deep))]


def _wrong_with(folder: Path, file: File, deep: bool) -> str | None:
    try:
        return _difference(folder / file.name, file, deep)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _difference(path: Path, file: File, deep: bool) -> str | None:
    if not path.exists():
        return "missing"
    if (size := path.stat().st_size) != file.size:
        return f"{size:,} bytes, {file.size:,} were written"
    if not deep:
        return None
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
            return "the content has changed since it was written (checksum)"
    return None


@dataclass(frozen=True)
class _Piece:
    """Where a stretch of a parameter lies in a file."""

    start: int
    count: int
    path: Path
    offset: int
    """Bytes from the start of the file."""


class Reader:
    """Reads any stretch of any parameter of a checkpoint, whoever wrote it. Reads headers once, then only what is asked."""

    def __init__(self, folder: Path):
        self.manifest = Manifest.read(folder)
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for file in self.manifest.files:
            self._index(folder / file.name)

    def _index(self, path: Path) -> None:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for key, entry in header.items():
            kind, _, place = key.partition("/")
            name, _, start = place.rpartition("@")
            offset = 8 + length + entry["data_offsets"][0]
            self._pieces[kind, name].append(_Piece(int(start), entry["shape"][0], path, offset))

    def read(self, kind: str, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` [n] with elements start..start+n-1 of the flattened parameter.

        Raises CheckpointError if the checkpoint does not hold all of them.
        """
        stop, found = start + len(out), 0
        for piece in self._pieces.get((kind, name), ()):
            low, high = max(start, piece.start), min(stop, piece.start + piece.count)
            if low < high:
                with piece.path.open("rb") as stream:
                    stream.seek(piece.offset + 4 * (low - piece.start))
                    out[low - start : high - start] = np.fromfile(stream, dtype=np.float32, count=high - low)
                found += high - low
        if found != len(out):
            raise CheckpointError(f"{kind} of {name}: {found:,} of {len(out):,} elements are in the checkpoint")

    def whole(self, name: str) -> np.ndarray:
        """A parameter's fp32 weights, in its own shape."""
        shape = self.manifest.parameters[name]
        out = np.empty(int(np.prod(shape)), dtype=np.float32)
        self.read("fp32", name, 0, out)
        return out.reshape(shape)
