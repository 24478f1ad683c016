"""Writes the small files of a run (events, metrics, budget) with retries, so that a full disk, a storage that is not
mounted for a moment or a hanging network file system does not end the run.

Data that cannot be written is kept in memory and retried with every later write, and by `flush`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from training.errors import StorageError
from training.storage import default_patience_s

_AGAIN_S = 1.0
"""Pause before a retry."""
_LOG = logging.getLogger("muster.storage")
Result = TypeVar("Result")


class SmallFiles:
    """Files of one writer. Every method raises StorageError once writing has failed for `patience_s`, and keeps the
    data for a later retry."""

    def __init__(
        self,
        patience_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.patience_s = default_patience_s() if patience_s is None else patience_s
        self._clock, self._sleep = clock, sleep
        self._waiting: dict[Path, _Appended | _Replaced] = {}
        """Data still to be written, the oldest first."""
        self._failing_since: float | None = None
        self._tried_at = 0.0
        self._lock = threading.RLock()

    def append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Append one row to a JSONL file in one write, so that a reader sees all of it or nothing."""
        with self._lock:
            self._waiting.setdefault(path, _Appended()).data += json.dumps(row).encode() + b"\n"
            self._write_soon()

    def replace(self, path: Path, text: str, *, new_folder: bool = False) -> None:
        """Replace a file atomically: after a full disk or a crash the old one is intact.
        `new_folder`: create its folder."""
        with self._lock:
            self._waiting[path] = _Replaced(text.encode(), new_folder)
            self._write_soon()

    def flush(self) -> None:
        """Return when everything is written."""
        with self._lock:
            while not self._write():
                self._sleep(_AGAIN_S)

    def patiently(self, operation: Callable[[], Result]) -> Result:
        """Run an operation on files, with retries while it raises OSError; returns its result."""
        with self._lock:
            while True:
                try:
                    result = operation()
                except OSError as error:
                    self._failed(error)
                    self._sleep(_AGAIN_S)
                else:
                    self._failing_since = None
                    return result

    def _write_soon(self) -> None:
        """Write immediately, or from time to time while writing fails, since each attempt may take long."""
        if self._failing_since is None or self._clock() - self._tried_at >= _AGAIN_S:
            self._write()

    def _write(self) -> bool:
        """Try to write the waiting data. Returns whether all of it is written."""
        self._tried_at = self._clock()
        try:
            for path in list(self._waiting):
                self._waiting[path].write(path)
                del self._waiting[path]
        except OSError as error:
            self._failed(error)
            return False
        self._failing_since = None
        return True

    def _failed(self, error: OSError) -> None:
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
            _LOG.warning("%s; the data is kept in memory and retried", error)
        if now - self._failing_since > self.patience_s:
            since, self._failing_since = self._failing_since, None
            raise StorageError(f"writing has failed for {now - since:.0f} s: {error}") from error


class _Appended:
    """Rows to append to a file."""

    def __init__(self) -> None:
        self.data = b""
        self._start: int | None = None
        """Their offset in the file after the first attempt: the next attempt truncates what a failed one has left."""

    def write(self, path: Path) -> None:
        with path.open("ab", buffering=0) as file:
            if self._start is None:
                self._start = file.tell()
                self.data = (b"" if _ends_with_a_row(path) else b"\n") + self.data
            elif file.tell() > self._start:
                file.truncate(self._start)
            _write_all(file, self.data)


class _Replaced:
    """The new content of a file, to which rows may be appended."""

    def __init__(self, data: bytes, new_folder: bool):
        self.data, self._new_folder = data, new_folder

    def write(self, path: Path) -> None:
        if self._new_folder:
            path.parent.mkdir(exist_ok=True)
        beside = path.with_name(f".{path.name}")
        try:
            with beside.open("wb", buffering=0) as file:
                _write_all(file, self.data)
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def _ends_with_a_row(path: Path) -> bool:
    """Return False if the last row is incomplete after a full disk or a crash."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _write_all(file: Any, data: bytes) -> None:
    """Write all bytes: one system call, unless the disk is nearly full."""
    done = file.write(data)
    while done < len(data):
        done += file.write(data[done:])
