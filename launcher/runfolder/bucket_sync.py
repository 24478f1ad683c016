"""The small files of a run in a bucket: written to a folder of this machine, and copied to the bucket as they change.

job.yaml, events, metrics, TensorBoard, logs. Checkpoints and models never pass through here:
workers write them to the bucket.
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
"""What tells how far a run is."""
ALIVE = ".alive"
"""A time: the driver was at work then."""
SAVE = ".save"
"""A request to save now (save_now.py), by its id."""
ALIVE_S = 120.0
"""A driver that has not said so for this long is gone."""
_PAUSE_S = 5.0
_SHARE_OF_TIME = 0.1
"""Large files take longer: copying must not keep the network busy."""
_END_S = 60.0
"""For a copy that is under way to end."""


_until_the_end = ExitStack()
atexit.register(_until_the_end.close)


def working_folder(remote: StoragePath) -> Path:
    """Where this machine keeps the small files of a run in a bucket while it works on it."""
    key = hashlib.sha256(remote.address.encode()).hexdigest()[:16]
    return cache_folder() / "runs" / key / remote.name


def view(remote: StoragePath) -> Path:
    """A copy of a run's small files to look at, gone when this process ends."""
    copy = _until_the_end.enter_context(temporary_folder("muster-view-")) / remote.name
    copy.mkdir()
    fetch(remote, copy)
    return copy


def fetch(remote: StoragePath, folder: Path) -> None:
    """Make the small files in a folder those of the bucket. The bucket is the truth, also of what it does not have."""
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
    """Whether a driver has worked on the run a moment ago."""
    try:
        said = datetime.fromisoformat((remote / ALIVE).read().decode())
    except (FileNotFoundError, ValueError):
        return False
    return (datetime.now(UTC) - said).total_seconds() < ALIVE_S


class Mirror:
    """Copies what changes in a folder to a bucket, every few seconds, until the run is closed
    or a later attempt claims it."""

    def __init__(self, folder: Path, remote: StoragePath, claim: Claim):
        self.folder, self.remote, self.claim = folder, remote, claim
        self._sent: dict[Path, tuple[int, int]] = {}
        self._request = b""
        self._busy = threading.Lock()
        self._woken, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something has happened that should be in the bucket soon."""
        self._woken.set()

    def flush(self) -> None:
        """Copy what has changed, now. Raises StorageError, OSError, and Superseded if the run is not ours any more."""
        with self._busy:
            self.claim.check()
            (self.remote / ALIVE).write(datetime.now(UTC).isoformat().encode())
            self._fetch_request()
            for path in sorted(self.folder.rglob("*")):
                self._send(path)

    def _fetch_request(self) -> None:
        """Put a new request to save into the folder, where the driver looks for it."""
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
        """Copy the rest. Raises as `flush` does."""
        self._closed.set()
        self._woken.set()
        self._thread.join(_END_S)  # else it might copy, and say that it is alive, after the end
        self.flush()
        (self.remote / ALIVE).remove()
