"""Where a run's files are: a folder, or a prefix of a bucket (`s3://`, `gs://`), behind the same few operations.

An operation on a bucket is tried again, with growing pauses, until it has failed for `patience_s`: a minute without
network must not cost a run. What cannot get better by waiting (no permission, no such bucket) is raised at once.

Knows nothing of checkpoints or runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import random
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any, TypeVar

import fsspec

from training.errors import InputError, StorageError
from training.io.fsspec_compat import path_in
from training.io.owned_folders import temporary_folder
from training.io.paths import is_below

Block = bytes | memoryview
_T = TypeVar("_T")

_PATIENCE_S = 300.0
_LONGEST_PAUSE_S = 10.0
_TOLD_AFTER_S = 3.0
_PART_BYTES = 32 << 20
"""Of a multipart upload; S3 takes 10,000 parts, so a file may have 320 GB."""
_S3_OPTIONS = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}}
_OF_THIS_PROCESS = ("file", "local", "memory", "data", "http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_CHANGING = ("size", "ETag", "etag", "LastModified", "updated", "mtime", "created")
"""What file systems say of a file that changes with its content; each has names of its own."""
_HOPELESS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
)
_HOPELESS_BY_NAME = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")


def is_remote(address: str) -> bool:
    """Whether an address is that of a bucket."""
    return "://" in address


def open_storage(address: str | Path, *, patience_s: float | None = None) -> StoragePath:
    """The place at a local path or a bucket's address.

    `patience_s`: how long to try an operation on a bucket; None: MUSTER_STORAGE_PATIENCE_S, or 5 minutes. Raises
    InputError for a kind of storage that is not installed.
    """
    if not is_remote(str(address)):
        return Local(Path(address))
    if patience_s is None:
        patience_s = default_patience_s()
    return Remote(str(address).rstrip("/"), _filesystem(str(address)), patience_s)


def default_patience_s() -> float:
    """How long what fails is tried again, in seconds: MUSTER_STORAGE_PATIENCE_S, or 5 minutes."""
    return float(os.environ.get("MUSTER_STORAGE_PATIENCE_S", _PATIENCE_S))


def why_not_writable(folder: StoragePath, who: str) -> str | None:
    """Why this process cannot write into a folder, None if it can. `who` tells processes apart that try at once."""
    probe = folder / f".probe-{who}"
    try:
        probe.write(b"")
        probe.remove()
    except (StorageError, OSError) as error:
        return f"{folder} cannot be written from {socket.gethostname()}: {_reason(error)}"
    return None


class StoragePath(ABC):
    """A file, or a folder of files, by its address. Nothing needs to be there yet."""

    address: str

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"Place({self.address})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]

    @abstractmethod
    def __truediv__(self, name: str) -> StoragePath:
        """The place `name` (which may have slashes) below this one."""

    @abstractmethod
    def read(self) -> bytes:
        """The whole file. Raises FileNotFoundError."""

    @abstractmethod
    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes start..stop-1 of files below this place, as (name, start, stop). Raises FileNotFoundError."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Write or replace the file: whole, or not at all."""

    @abstractmethod
    def create(self, data: bytes) -> bool:
        """Write the file unless it exists. Of several who try only one gets True."""

    @abstractmethod
    def write_blocks(self, blocks: Sequence[Block]) -> None:
        """Write a large file, flushed to the disk. One that is cut short may stay behind."""

    @abstractmethod
    def children(self) -> dict[str, int | None]:
        """What is in this folder: bytes of each file, None for a folder, by name. Empty if there is no such folder."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the file, or the folder with everything in it, if it is there."""


class Local(StoragePath):
    """A path."""

    def __init__(self, path: Path):
        self.path = path
        self.address = str(path)

    def __truediv__(self, name: str) -> Local:
        return Local(self.path / name)

    def read(self) -> bytes:
        return self.path.read_bytes()

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [_read_range(self.path / name, start, stop) for name, start, stop in ranges]

    def write(self, data: bytes) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            _write_flushed(beside, [data])
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
        flush_folder(self.path.parent)

    def create(self, data: bytes) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return True

    def write_blocks(self, blocks: Sequence[Block]) -> None:
        _write_flushed(self.path, blocks)

    def children(self) -> dict[str, int | None]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return {}
        found = {}
        for name in names:
            with suppress(FileNotFoundError):  # others may be deleting
                stat = os.stat(self.path / name)
                found[name] = None if S_ISDIR(stat.st_mode) else stat.st_size
        return found

    def remove(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def _read_range(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        data = file.read(stop - start)
        while len(data) < stop - start and (more := file.read(stop - start - len(data))):
            data += more
    return data


def _write_flushed(path: Path, blocks: Iterable[Block]) -> None:
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            done = 0
            while done < len(block):  # one call to the system may write a part
                done += file.write(block[done:])
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make sure that names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Remote(StoragePath):
    """A key of a bucket, or all keys that begin with it."""

    def __init__(self, address: str, filesystem: Any, patience_s: float):
        self.address = address
        self.filesystem = filesystem
        self.patience_s = patience_s
        self._path = path_in(filesystem, address)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.address}/{name}", self.filesystem, self.patience_s)

    def read(self) -> bytes:
        content: bytes = self._patiently(lambda: self.filesystem.cat_file(self._path))
        return content

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        names, starts, stops = zip(*ranges, strict=True) if ranges else ((), (), ())
        paths = [f"{self._path}/{name}" for name in names]
        return self._patiently(lambda: self.filesystem.cat_ranges(paths, list(starts), list(stops), on_error="raise"))

    def write(self, data: bytes) -> None:
        self._patiently(lambda: self.filesystem.pipe_file(self._path, data))

    def create(self, data: bytes) -> bool:
        try:
            self._patiently(lambda: self.filesystem.pipe_file(self._path, data, mode="create"))
        except FileExistsError:
            return self.read() == data  # perhaps our own, whose answer was lost on the way
        return True

    def write_blocks(self, blocks: Sequence[Block]) -> None:
        self._patiently(lambda: self._upload(blocks))

    def _upload(self, blocks: Sequence[Block]) -> None:
        file = self.filesystem.open(self._path, "wb", block_size=_PART_BYTES)
        try:
            for block in blocks:
                file.write(block)
        except BaseException:
            with suppress(Exception):  # of a part that is there nobody can make a file any more
                file.discard()
            file.closed = True  # else its end of life would upload the rest
            raise
        file.close()

    def children(self) -> dict[str, int | None]:
        try:
            entries = self._patiently(lambda: self.filesystem.ls(self._path, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        # The folder itself may be listed, also as the empty object by which some tools mark one:
        # a file whose name ends with a slash.
        inside = [
            e for e in entries if e["name"] != self._path and (e["name"], e["type"]) != (f"{self._path}/", "file")
        ]
        named = {self._child(entry): entry for entry in inside}
        return {name: entry["size"] if entry["type"] == "file" else None for name, entry in named.items()}

    def _child(self, entry: dict[str, Any]) -> str:
        """Raises StorageError for a name that would lead out of a folder: whoever can write
        to a bucket chooses its names."""
        name = entry["name"].removeprefix(f"{self._path}/")
        if not is_below(name):
            raise StorageError(f"{self.address}: holds {name!r}, which cannot be the name of a file; remove it")
        return str(name)

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self._patiently(lambda: self.filesystem.rm(self._path, recursive=True))

    def fingerprint(self) -> str:
        """Another one whenever a file below this place is written anew."""
        files = self._patiently(lambda: self.filesystem.find(self._path, detail=True, refresh=True))
        states = sorted((name, *(str(entry.get(key)) for key in _CHANGING)) for name, entry in files.items())
        return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]

    def _patiently(self, operation: Callable[[], _T]) -> _T:
        """Do it, again and again while it fails and might not. Raises StorageError when that has lasted too long."""
        began, pause, told = time.monotonic(), 0.2, False
        while True:
            try:
                return operation()
            except _HOPELESS:
                raise
            except Exception as error:  # every storage has errors of its own for a network that does not work
                waited = time.monotonic() - began
                if type(error).__name__ in _HOPELESS_BY_NAME:
                    raise StorageError(f"{self.address}: {_reason(error)}") from error
                if waited + pause > self.patience_s:
                    raise StorageError(f"{self.address}: the storage does not answer: {_reason(error)}") from error
                if waited > _TOLD_AFTER_S and not told:
                    told = True
                    _LOG.warning("%s: the storage does not answer (%s); trying on", self.address, _reason(error))
            time.sleep(pause * random.uniform(0.5, 1.5))  # workers must not come back all at once
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def upload(folder: Path, target: StoragePath) -> None:
    """Copy every file of a local folder to a place."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        upload_file(path, target / str(path.relative_to(folder)))


def upload_file(path: Path, target: StoragePath) -> None:
    """Copy a local file to a place."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        data = memoryview(content)
        target.write_blocks([data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)])


def download(source: StoragePath, folder: Path) -> None:
    """Copy every file of a place to a local folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in source.children().items():
        if size is None:
            download(source / name, folder / name)
        else:
            _download_file(source, name, size, folder / name)


def _download_file(source: StoragePath, name: str, size: int, path: Path) -> None:
    with path.open("wb") as file:
        for start in range(0, size, _PART_BYTES):
            file.write(*source.read_ranges([(name, start, min(start + _PART_BYTES, size))]))


def local_copy(source: StoragePath, cache: Path) -> Path:
    """The folder itself, or a copy of a bucket's in `cache`, made once for every state that the original is in."""
    if isinstance(source, Local):
        return source.path
    assert isinstance(source, Remote)
    copy = cache / "copies" / source.fingerprint()
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(".tmp-", str(copy.parent)) as beside:
            download(source, beside / "copy")
            try:
                (beside / "copy").rename(copy)
            except OSError:
                if not copy.exists():  # else another process was faster
                    raise
    return copy


_LOG = logging.getLogger("muster.storage")


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _filesystem(address: str) -> Any:
    protocol = address.partition("://")[0]
    if protocol in _OF_THIS_PROCESS:
        raise InputError.of(address, f"{protocol}:// is not storage that workers share; use a folder, s3:// or gs://")
    options = _S3_OPTIONS if _EXTRAS.get(protocol) == "s3" else {}
    try:
        filesystem, _ = fsspec.core.url_to_fs(address, use_listings_cache=False, **options)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        advice = f"pip install 'muster-train[{extra}]'" if extra else "use a folder, s3:// or gs://"
        raise InputError.of(address, f"{protocol}:// cannot be used ({error}); {advice}") from error
    return filesystem
