"""What the launcher uses of Ray that Ray does not promise: private names, one function each.

tests/launcher/workers/test_ray_compat.py says what each relies on. Loads Ray late.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

GCS, RAYLET = "gcs_server", "raylet"
"""Ray's names of its two essential processes."""
HEAD_RESOURCE = "node:__internal_head__"
"""The resource by which the head of a cluster is found; Ray has no public query for it."""


def job_config(code_folders: Sequence[str]) -> Any:
    """Return the `JobConfig` with which Ray's workers import Muster's code from these folders.

    Private: `_client_job`, Ray's switch against importing from the working folder first, which a submitted job does not
    need (RAY_JOB_CONFIG_JSON_ENV_VAR is set there); `_py_driver_sys_path`, where workers import from.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.job_config import JobConfig

    return JobConfig(_client_job=RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ, _py_driver_sys_path=list(code_folders))


def local_settings(folder: str, *, keep_idle_ms: int, without_gcs_s: int) -> dict[str, Any]:
    """Return the arguments of `ray.init` for a Ray on loopback with its files in a folder.

    Private: `_node_ip_address`, `_temp_dir` and `_system_config`, with two of its keys: how long idle worker processes
    are kept, and how long the raylet and the workers wait for a GCS that has ended. Ray does not start with others.
    """
    return {
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
        "_system_config": {
            "idle_worker_killing_time_threshold_ms": keep_idle_ms,
            "gcs_rpc_server_reconnect_timeout_s": without_gcs_s,
        },
    }


@contextmanager
def processes_in_own_sessions() -> Iterator[None]:
    """Make Ray start each of its processes in a separate session within the block, and block SIGTERM until its end,
    where our handlers replace those of Ray, one of which aborts the process. If the block fails, all processes of Ray
    are killed.

    Private: `ray._private.services.ConsolePopen`, the class that starts Ray's processes, and
    `ray._private.utils.set_sigterm_handler`, both replaced for the length of the block. Ray has no settings for that.
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


def essential_processes() -> dict[str, subprocess.Popen[bytes]]:
    """Return the essential processes that `ray.init` started, by Ray's names.

    Private: `ray._private.worker._global_node` and its table `all_processes`.
    """
    from ray._private import worker

    node: Any = worker._global_node
    started = node.all_processes
    return {name: started[name][0].process for name in (GCS, RAYLET)}


def draining_nodes() -> dict[str, int]:
    """Return the machines that are being drained, by node id, with their deadline (Unix time, ms; 0: unknown).

    Private: `ray._private.state.state.get_draining_nodes`.
    """
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Return the free resources of each live machine, by node id; Ray's public function returns their sum.

    Private: `ray._private.state.available_resources_per_node`.
    """
    from ray._private.state import available_resources_per_node

    found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return found


def autoscaling_state(timeout_s: float) -> Any | None:
    """Return the report of version 2 of the autoscaler (a protobuf `AutoscalingState`); None where there is none.

    Private: `ray._raylet.GcsClient.get_cluster_status` and the generated message `GetClusterStatusReply`.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # in C++
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # generated

    reply = GetClusterStatusReply()
    client: Any = GcsClient(ray.get_runtime_context().gcs_address)
    reply.ParseFromString(client.get_cluster_status(timeout_s=timeout_s))
    return reply.autoscaling_state if reply.HasField("autoscaling_state") else None


def silence_job_client() -> None:
    """Make the client of Ray Jobs log errors only: Muster itself reports uploads and closed connections.

    Private: the modules `ray.dashboard.modules.dashboard_sdk` and `ray.dashboard.modules.job.sdk`, for their `logger`.
    """
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk

    for module in (dashboard_sdk, sdk):
        module.logger.setLevel(logging.ERROR)
