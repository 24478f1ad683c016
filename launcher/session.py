"""A connection to Ray: to the cluster at RAY_ADDRESS, or to one of our own on this machine that ends with us."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.capacity import num_gpus
from launcher.host import nursery_at_hand
from launcher.short_tempdir import short_tempdir
from launcher.subprocesses import code_folders
from training.errors import TrainingError

_OBJECT_STORE_BYTES = 128 << 20
"""Calls carry metrics and file names; weights for a rollout group pass through in pieces of 32 MiB."""
_LONGEST_FOLDER = 38
"""Bytes: the paths of Ray's sockets begin with it and must fit in 107."""
_KEEP_IDLE_MS = 600_000
"""Ray begins processes for actors when it starts, and by itself ends them after a second in which nobody needs them."""


@contextmanager
def own_nursery() -> Iterator[None]:
    """A nursery for the length of the block, where Ray will be our own. Its imports take as long as Ray's start: begin it before."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with nursery_at_hand("cuda" if num_gpus() else "cpu"):
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
        ray.init(
            namespace="muster", log_to_driver=False, logging_level=logging.ERROR, job_config=_job_config(), **settings
        )
    except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        ray.shutdown()
        raise TrainingError(f"{failure}: {error}; {advice} (this is Ray {ray.__version__})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _job_config() -> Any:
    """Where Ray's workers find Muster's code. Ray itself would have them import from the working folder first.

    `_client_job` is Ray's own switch against that (its client has it); a submitted job has a folder of its own, which Ray takes instead.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.job_config import JobConfig

    return JobConfig(_client_job=RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ, _py_driver_sys_path=code_folders())


@contextmanager
def _local(num_workers: int) -> Iterator[None]:
    """A Ray of this process alone: bound to loopback, opened by a token nobody else has, its files in a folder of its own."""
    folder = short_tempdir(_LONGEST_FOLDER)
    inside = f"{folder}/r"  # Ray opens its folder to everyone; the one around it is ours alone
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": inside,
        # Where Ray does not expect other hosts it binds every port to loopback. The name speaks of other systems; what it
        # does on Linux is asserted by tests/launcher/test_workers.py.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    settings = {
        # Workers on CPUs may outnumber the cores; Ray's CPUs are places to sit, not cores.
        "num_cpus": max(num_workers, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": inside,
        "_system_config": {"idle_worker_killing_time_threshold_ms": _KEEP_IDLE_MS},
    }
    try:
        advice = f"is there room in {folder} and /dev/shm?"
        with _connected("Ray did not start on this machine", advice, address="local", **settings):
            yield
    finally:
        _remove(folder)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _remove(folder: str) -> None:
    """Remove Ray's folder. Its last processes may still be writing a log as they end."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)
