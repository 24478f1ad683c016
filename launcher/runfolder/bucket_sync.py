"""Copies the small files of a run to a bucket: they are written to a local folder and uploaded when they change.

These are job.yaml, events, metrics, TensorBoard files and logs. Workers write checkpoints and models to the bucket
themselves.
"""

from __future__ import annotations

import atexit
import hashlib
import threading
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from launcher.runfolder.cache import cache_folder
from training.checkpoint.repository import Claim
from training.errors import StorageError, Superseded
from training.io.owned_folders import temporary_folder
from training.storage import StoragePath, upload_file

FETCHED, FETCHED_OF_PHASES = ("job.yaml", "events.jsonl", "spent.json"), ("metrics.jsonl",)
"""The files that show the progress of a run."""
ALIVE = ".alive"
"""File with the last time at which the driver was running."""
SAVE = ".save"
"""File with the id of a request to save now (save_request.py)."""
ALIVE_S = 120.0
"""A driver that has not updated the file for this time is gone."""
_PAUSE_S = 5.0
_SHARE_OF_TIME = 0.1
"""Largest share of time spent on copying, so that large files do not keep the network busy."""
_END_S = 60.0
"""Longest time for a running copy to end."""


_until_the_end = ExitStack()
atexit.register(_until_the_end.close)


def working_folder(remote: StoragePath) -> Path:
    """Return the local folder for the small files of a run in a bucket."""
    key = hashlib.sha256(remote.address.encode()).hexdigest()[:16]
    return cache_folder() / "runs" / key / remote.name


def view(remote: StoragePath) -> Path:
    """Return a temporary copy of a run's small files, which is deleted when this process ends."""
    copy = _until_the_end.enter_context(temporary_folder("muster-view-")) / remote.name
    copy.mkdir()
    fetch(remote, copy)
    return copy


def fetch(remote: StoragePath, folder: Path) -> None:
    """Replace the small files in a folder by those of the bucket; files that the bucket does not have are deleted."""
    phases = {name for name, size in remote.children().items() if size is None and not name.startswith(".")}
    phases |= {path.parent.name for name in FETCHED_OF_PHASES for path in folder.glob(f"*/{name}")}
    names = [*FETCHED, *(f"{phase}/{name}" for phase in sorted(phases) for name in FETCHED_OF_PHASES)]
    for name in names:
        path = folder / name
        try:
            data = (remote / name).read()
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def is_alive(remote: StoragePath) -> bool:
    """Return whether a driver is running, by the time in the bucket."""
    try:
        said = datetime.fromisoformat((remote / ALIVE).read().decode())
    except (FileNotFoundError, ValueError):
        return False
    return (datetime.now(UTC) - said).total_seconds() < ALIVE_S


class Mirror:
    """Copies changed files of a folder to a bucket every few seconds, until the run is closed or a later attempt claims
    it."""

    def __init__(self, folder: Path, remote: StoragePath, claim: Claim):
        self.folder, self.remote, self.claim = folder, remote, claim
        self._sent: dict[Path, tuple[int, int]] = {}
        self._request = b""
        self._busy = threading.Lock()
        self._woken, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Request a copy soon."""
        self._woken.set()

    def flush(self) -> None:
        """Copy all changes now. Raises StorageError, OSError, and Superseded if another process has claimed the run."""
        with self._busy:
            self.claim.check()
            (self.remote / ALIVE).write(datetime.now(UTC).isoformat().encode())
            self._fetch_request()
            for path in sorted(self.folder.rglob("*")):
                self._send(path)

    def _fetch_request(self) -> None:
        """Copy a new request to save into the local folder, where the driver looks for it."""
        with suppress(FileNotFoundError):
            request = (self.remote / SAVE).read()
            if request != self._request:
                self._request = request
                (self.folder / SAVE).write_bytes(request)

    def _send(self, path: Path) -> None:
        if path.name.startswith(".") or not path.is_file():
            return
        with suppress(FileNotFoundError):  # replaced at this moment; its successor is sent the next time
            stat = path.stat()
            state = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(path) != state:
                upload_file(path, self.remote / str(path.relative_to(self.folder)))
                self._sent[path] = state

    def _run(self) -> None:
        pause = _PAUSE_S
        while not self._closed.is_set():
            self._woken.wait(pause)
            self._woken.clear()
            if self._closed.is_set():
                return  # the rest is copied by whoever closes
            began = time.monotonic()
            try:
                self.flush()
            except Superseded:
                return  # whoever flushes next is told
            except (StorageError, OSError):
                pass  # the next time, or whoever flushes
            pause = max(_PAUSE_S, (time.monotonic() - began) / _SHARE_OF_TIME)
            self._closed.wait(1.0)  # events come in groups

    def close(self) -> None:
        """Copy the remaining changes. Raises as `flush` does."""
        self._closed.set()
        self._woken.set()
        self._thread.join(_END_S)  # else it might copy, and say that it is alive, after the end
        self.flush()
        (self.remote / ALIVE).remove()
