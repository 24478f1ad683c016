"""A connection to Ray: to the cluster at RAY_ADDRESS, or to one of our own on this machine that ends with us."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from training.errors import TrainingError

_OBJECT_STORE_BYTES = 128 << 20
"""Calls carry metrics and file names, never weights."""
_LONGEST_TEMPORARY = 24
"""Characters: the names of Ray's sockets begin with it and must fit in 107."""


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
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if "RAY_AUTH_TOKEN" not in os.environ else "token")
    import ray

    try:
        ray.init(address=address, namespace="muster", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise TrainingError(
            f"the Ray cluster at {address} does not let us in: {error}; is RAY_AUTH_TOKEN its token, and Ray "
            f"{ray.__version__} its version?"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local(num_workers: int) -> Iterator[None]:
    """A Ray of this process alone: bound to loopback, opened by a token nobody else has, its files in a folder of its own."""
    temporary = tempfile.gettempdir()
    short_enough = len(temporary) <= _LONGEST_TEMPORARY
    folder = tempfile.mkdtemp(prefix="muster-", dir=temporary if short_enough else "/tmp")
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        # Where Ray does not expect other hosts it binds every port to loopback. The name speaks of other systems; what it
        # does on Linux is asserted by tests/launcher/test_workers.py.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    import ray

    try:
        ray.init(
            address="local",
            # Workers on CPUs may outnumber the cores; Ray's CPUs are places to sit, not cores.
            num_cpus=max(num_workers, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            namespace="muster",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
