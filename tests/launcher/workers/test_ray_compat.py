"""What the launcher relies on in Ray without a promise, in the version that is installed."""

from __future__ import annotations

import logging
import os
import signal

import psutil
import pytest

from launcher.workers import ray_compat

pytestmark = pytest.mark.cpu


def test_workers_import_from_the_folders_that_are_named_and_not_from_the_working_folder(monkeypatch):
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    config = ray_compat.job_config(["/code"])
    assert (config._client_job, config._py_driver_sys_path) == (True, ["/code"])
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert not ray_compat.job_config(["/code"])._client_job


@pytest.mark.usefixtures("ray_cluster")
def test_no_process_of_ray_is_in_our_process_group():
    parts = ("gcs_server", "raylet/raylet", "log_monitor", "dashboard", "launcher.workers.fork_server")
    commands = {each: " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)}
    ours = {part: [each for each, command in commands.items() if part in command] for part in parts}
    assert all(ours.values())
    assert [each for found in ours.values() for each in found if os.getpgid(each.pid) == os.getpgid(0)] == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "Ray has taken SIGTERM for itself"


@pytest.mark.usefixtures("ray_cluster")
def test_the_processes_that_ray_cannot_do_without_are_children_that_run():
    processes = ray_compat.essential_processes()
    assert processes.keys() == {ray_compat.GCS, ray_compat.RAYLET}
    assert [process.poll() for process in processes.values()] == [None, None]
    assert [name in " ".join(psutil.Process(each.pid).cmdline()) for name, each in processes.items()] == [True, True]


@pytest.mark.usefixtures("ray_cluster")
def test_machines_are_known_by_the_ids_of_ray_nodes():
    import ray

    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"
    assert ray_compat.HEAD_RESOURCE in node["Resources"]
    assert ray_compat.free_resources()[node["NodeID"]]["CPU"] > 0
    assert ray_compat.draining_nodes() == {}


@pytest.mark.usefixtures("ray_cluster")
def test_no_autoscaler_reports_of_a_ray_without_one():
    assert ray_compat.autoscaling_state(timeout_s=10) is None


def test_the_report_of_the_autoscaler_has_the_fields_that_are_read():
    from ray.core.generated.autoscaler_pb2 import AutoscalingState  # type: ignore[attr-defined]

    fields = AutoscalingState.DESCRIPTOR.fields_by_name
    read = {
        "pending_instance_requests": {"ray_node_type_name", "count"},
        "pending_instances": {"ray_node_type_name"},
        "failed_instance_requests": {"ray_node_type_name", "reason", "failed_ts"},
        "infeasible_gang_resource_requests": {"details"},
    }
    for name, inner in read.items():
        assert inner <= set(fields[name].message_type.fields_by_name)


def test_the_client_of_ray_jobs_logs_errors_only():
    ray_compat.silence_job_client()
    names = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
    assert [logging.getLogger(name).level for name in names] == [logging.ERROR, logging.ERROR]
