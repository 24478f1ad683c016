"""A connection to Ray: to the cluster at RAY_ADDRESS, or to one of our own on this machine that ends with us.

The processes of a Ray of our own hear no signal that is meant for the job: they have sessions of their own. If one of
them ends all the same, `lost` says so at once, without asking Ray, and `restart` starts another Ray.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.process import ray_address
from launcher.process.short_tempdir import short_tempdir
from launcher.process.subprocesses import code_folders
from launcher.workers.errors import NoMachines, RayLost, WorkerDied, describe
from launcher.workers.supervisor import fork_server_here
from training.device import device_type, num_gpus
from training.errors import MusterError, TrainingError

_OBJECT_STORE_BYTES = 128 << 20
"""Calls carry metrics and file names; weights for a rollout group pass through in pieces of 32 MiB."""
_LONGEST_FOLDER = 38
"""Bytes: the paths of Ray's sockets begin with it and must fit in 107."""
_KEEP_IDLE_MS = 600_000
"""Ray begins processes for actors when it starts, and by itself ends them after a second in which nobody needs them."""
_WITHOUT_GCS_S = 3600
"""How long the rest of our own Ray lives on without its GCS (Ray's default: a minute): as long
as saving a large model may take."""
_GCS, _RAYLET = "gcs_server", "raylet"
"""Ray's own names of the two processes that it cannot do without."""


@contextmanager
def own_fork_server() -> Iterator[None]:
    """A fork server for the length of the block, where Ray will be our own.
    Its imports take as long as Ray's start: begin it before."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with fork_server_here(device_type(num_gpus() > 0)):
        yield


@contextmanager
def ray_session(num_workers: int) -> Iterator[None]:
    """Be connected to Ray for the length of the block."""
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
        f"the Ray cluster at {address} does not let us in", "is RAY_AUTH_TOKEN its token?", address=address
    ):
        yield


@contextmanager
def _connected(failure: str, advice: str, **settings: Any) -> Iterator[None]:
    import ray
    from ray.exceptions import RayError

    try:
        with _processes_apart():
            ray.init(
                namespace="muster",
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=_job_config(),
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


def _job_config() -> Any:
    """Where Ray's workers find Muster's code. Ray itself would have them import from the working folder first.

    `_client_job` is Ray's own switch against that (its client has it);
    a submitted job has a folder of its own, which Ray takes instead.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.job_config import JobConfig

    return JobConfig(_client_job=RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ, _py_driver_sys_path=code_folders())


@contextmanager
def _processes_apart() -> Iterator[None]:
    """In the block Ray starts each of its processes in a session of its own, and SIGTERM waits for the end of the
    block: Ray's handlers, of which one aborts the process, are replaced by ours there. If the block fails, nothing of
    Ray stays behind.

    Ray has no settings for that. The private names that this replaces are held by
    tests/launcher/workers/test_ray_session.py.
    """
    from ray import _private

    services: Any = _private.services
    utils: Any = _private.utils
    popen, take_sigterm = services.ConsolePopen, utils.set_sigterm_handler
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, preexec_fn: Callable[[], None], **kwargs: Any) -> subprocess.Popen[bytes]:
        def in_child() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            preexec_fn()

        started.append(popen(*args, preexec_fn=in_child, start_new_session=True, **kwargs))
        return started[-1]

    services.ConsolePopen, utils.set_sigterm_handler = start, lambda handler: None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    except BaseException:
        for process in started:
            process.kill()
        raise
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = popen, take_sigterm
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class Lost:
    """What has ended of a Ray of our own."""

    words: str
    workers_answer: bool
    """Whether calls of workers are still answered: only the GCS is gone, which new workers need."""


class _OwnRay:
    """A Ray of this process alone: bound to loopback, opened by a token nobody else has,
    its files in a folder of its own."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._running = ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        with ExitStack() as stack:
            folder = stack.enter_context(short_tempdir(_LONGEST_FOLDER))
            inside = f"{folder}/r"  # Ray opens its folder to everyone; the one around it is ours alone
            stack.enter_context(_environment(inside))
            advice = f"is there room in {folder} and /dev/shm?"
            stack.enter_context(_connected("Ray did not start on this machine", advice, **self._settings(inside)))
            self._processes = _processes_of_ray()
            self._running = stack.pop_all()

    def _settings(self, folder: str) -> dict[str, Any]:
        return {
            "address": "local",
            # Workers on CPUs may outnumber the cores; Ray's CPUs are places to sit, not cores.
            "num_cpus": max(self.num_workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": folder,
            "_system_config": {
                "idle_worker_killing_time_threshold_ms": _KEEP_IDLE_MS,
                "gcs_rpc_server_reconnect_timeout_s": _WITHOUT_GCS_S,
            },
        }

    def lost(self) -> Lost | None:
        ended = {name: status for name, process in self._processes.items() if (status := process.poll()) is not None}
        if not ended:
            return None
        words = " and ".join(f"Ray's {name} {describe(WorkerDied(status))}" for name, status in ended.items())
        return Lost(words, workers_answer=_RAYLET not in ended)

    def end(self) -> None:
        if self.lost() is not None:  # what is left would wait for what is gone
            for process in self._processes.values():
                process.kill()
        self._processes = {}
        with suppress(OSError):  # Ray, too, cannot write where its folder was
            self._running.close()


_own: _OwnRay | None = None
"""The one of this process, if it has one: Ray itself is one connection a process."""


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
    """Whether the Ray that this process is connected to is one of its own."""
    return _own is not None


def lost() -> Lost | None:
    """What has ended of a Ray of our own, None while all of it lives, and of the Ray of others.
    Asks the kernel, not Ray."""
    return None if _own is None else _own.lost()


def check() -> None:
    """Raises RayLost if something of a Ray of our own has ended: whatever asks Ray now would wait for ever."""
    if (found := lost()) is not None:
        raise RayLost(found.words)


def restart() -> None:
    """Start another Ray of our own in place of one that is lost. Raises NoMachines if that fails twice."""
    assert _own is not None
    _own.end()
    try:
        _own.start()
    except (MusterError, OSError):  # OSError: there is no room for its folder
        try:
            _own.start()
        except (MusterError, OSError) as error:
            raise NoMachines(f"Ray has ended and does not start again: {error}") from error


def _processes_of_ray() -> dict[str, subprocess.Popen[bytes]]:
    """The processes that `ray.init` has started and Ray cannot do without, by Ray's names."""
    from ray._private import worker

    node: Any = worker._global_node
    started = node.all_processes
    return {name: started[name][0].process for name in (_GCS, _RAYLET)}


@cache
def _token() -> str:
    """That nobody else has. One for the life of this process: Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What Ray reads from the environment, for the length of the block."""
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
