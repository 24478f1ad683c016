"""Connects to Ray: to the cluster at RAY_ADDRESS, or to an own instance on this machine that ends with this process.

The processes of an own instance run in separate sessions, so that signals for the job do not reach them. If one of them
ends nevertheless, `lost` reports it immediately, without a call to Ray, and `restart` starts another instance.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.process import ray_address
from launcher.process.short_tempdir import short_tempdir
from launcher.process.subprocesses import code_folders
from launcher.workers import ray_compat
from launcher.workers.errors import NoMachines, RayLost, WorkerDied, describe
from launcher.workers.supervisor import fork_server_here
from training.device import device_type, num_gpus
from training.errors import MusterError, TrainingError

_OBJECT_STORE_BYTES = 128 << 20
"""Calls carry metrics and file names; weights for a rollout group pass through in pieces of 32 MiB."""
_LONGEST_FOLDER = 38
"""Bytes. The paths of Ray's sockets begin with the folder and may have 107 bytes."""
_KEEP_IDLE_MS = 600_000
"""Ray starts processes for actors in advance, and by default ends them after one idle second."""
_WITHOUT_GCS_S = 3600
"""How long the rest of our own Ray survives without its GCS (Ray's default: a minute): as long as saving a large model
may take."""


@contextmanager
def own_fork_server() -> Iterator[None]:
    """Run a fork server within the block if Ray will be an own instance.
    Its imports take as long as Ray's start, so start it first."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with fork_server_here(device_type(num_gpus() > 0)):
        yield


@contextmanager
def ray_session(num_workers: int) -> Iterator[None]:
    """Connect to Ray within the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    with _joined(address) if address else _local(num_workers):
        yield


@contextmanager
def _joined(address: str) -> Iterator[None]:
    ray_address.check(address)
    token_file = Path.home() / ".ray" / "auth_token"
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or token_file.exists()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
    with _connected(
        f"cannot connect to the Ray cluster at {address}", "check that RAY_AUTH_TOKEN is its token", address=address
    ):
        yield


@contextmanager
def _connected(failure: str, advice: str, **settings: Any) -> Iterator[None]:
    import ray
    from ray.exceptions import RayError

    try:
        with ray_compat.processes_in_own_sessions():
            ray.init(
                namespace="muster",
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=ray_compat.job_config(code_folders()),
                **settings,
            )
    except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        ray.shutdown()
        raise TrainingError(f"{failure}: {error}; {advice} (this is Ray {ray.__version__})") from error
    except BaseException:
        ray.shutdown()
        raise
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Lost:
    """The processes of our own Ray that have ended."""

    words: str
    workers_answer: bool
    """Whether workers still answer calls: only the GCS is gone, which new workers need."""


class _OwnRay:
    """A Ray instance for this process alone: bound to loopback, protected by a secret token, with a private folder."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._running = ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        with ExitStack() as stack:
            folder = stack.enter_context(short_tempdir(_LONGEST_FOLDER))
            inside = f"{folder}/r"  # Ray opens its folder to everyone; the one around it is ours alone
            stack.enter_context(_environment(inside))
            advice = f"check the free space in {folder} and /dev/shm"
            stack.enter_context(_connected("Ray did not start on this machine", advice, **self._settings(inside)))
            self._processes = ray_compat.essential_processes()
            self._running = stack.pop_all()

    def _settings(self, folder: str) -> dict[str, Any]:
        return {
            "address": "local",
            # Workers on CPUs may outnumber the cores; Ray's CPUs are places to sit, not cores.
            "num_cpus": max(self.num_workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            **ray_compat.local_settings(folder, keep_idle_ms=_KEEP_IDLE_MS, without_gcs_s=_WITHOUT_GCS_S),
        }

    def lost(self) -> Lost | None:
        ended = {name: status for name, process in self._processes.items() if (status := process.poll()) is not None}
        if not ended:
            return None
        words = " and ".join(f"Ray's {name} {describe(WorkerDied(status))}" for name, status in ended.items())
        return Lost(words, workers_answer=ray_compat.RAYLET not in ended)

    def end(self) -> None:
        if self.lost() is not None:  # what is left would wait for what is gone
            for process in self._processes.values():
                process.kill()
        self._processes = {}
        with suppress(OSError):  # Ray, too, cannot write where its folder was
            self._running.close()


_own: _OwnRay | None = None
"""The instance of this process, if it has one: Ray allows one connection per process."""


@contextmanager
def _local(num_workers: int) -> Iterator[None]:
    global _own
    _own = _OwnRay(num_workers)
    try:
        _own.start()
        yield
    finally:
        _own.end()
        _own = None


def is_own() -> bool:
    """Return whether this process is connected to an own Ray instance."""
    return _own is not None


def lost() -> Lost | None:
    """Return what has ended of our own Ray instance; None while all of it runs, or if Ray is not ours.
    Asks the kernel, not Ray."""
    return None if _own is None else _own.lost()


def check() -> None:
    """Raises RayLost if a process of our own Ray has ended, since any call to Ray would now block forever."""
    if (found := lost()) is not None:
        raise RayLost(found.words)


def restart() -> None:
    """Start another Ray instance in place of a lost one. Raises NoMachines if that fails twice."""
    assert _own is not None
    _own.end()
    try:
        _own.start()
    except (MusterError, OSError):  # OSError: there is no room for its folder
        try:
            _own.start()
        except (MusterError, OSError) as error:
            raise NoMachines(f"Ray ended and could not be restarted: {error}") from error


@cache
def _token() -> str:
    """Return a secret token. It stays the same for this process, since Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Set the environment variables that Ray reads, within the block."""
    own: Mapping[str, str] = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_TMPDIR": folder,
        # Where Ray does not expect other hosts it binds every port to loopback. The name speaks of other systems; what
        # it does on Linux is asserted by tests/launcher/workers/test_worker_group.py.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
