"""A cluster that grows and shrinks: Ray's own autoscaler, with machines that are processes of this one (Ray's provider for that)."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.dashboard import Dashboard
from cluster.machine import HERE, free_port
from cluster.node import Node, head_arguments, new_mark
from tests.launcher.test_jobs_on_cluster import Commands, until

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]
HEAD_ID = "f" * 51 + "00000"
"""The provider knows the head by it."""
IDLE_MINUTES = 0.1


class Scaling(Commands):
    """`muster` beside a cluster whose head has no places for workers; there may be three machines of one place each."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.node = Node(HERE, sys.executable, new_mark())
        port, dashboard = free_port(), free_port()
        token = secrets.token_hex(32)
        (folder / "token").write_text(token)
        (folder / "autoscaler.yaml").write_text(yaml.safe_dump(_config(port)))
        ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
        arguments = [*head_arguments("127.0.0.1", port, dashboard), "--num-cpus=0", "--num-gpus=0", *ports]
        arguments.append(f"--autoscaling-config={folder / 'autoscaler.yaml'}")
        environment = {
            "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        }  # fmt: skip
        self.node.start(self.node.script(arguments, environment=environment), token)
        address = f"http://127.0.0.1:{dashboard}"
        self.dashboard = Dashboard(address, token, "the cluster")
        spec = {"provider": "existing", "address": address, "token_file": str(folder / "token"), "shared": ["/"]}
        (folder / "there.yaml").write_text(json.dumps(spec))

    def run(self, job: Path, *overrides: str, status: int = 0) -> str:
        return self("run", str(job), *overrides, "--on", str(self.folder / "there.yaml"), status=status)

    def machines(self) -> int:
        """That are up, beside the head."""
        return len(self.dashboard.nodes()) - 1


def _config(port: int) -> dict:
    lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
        "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
    )  # fmt: skip
    provider = {
        "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True, "disable_launch_config_check": True, "launch_multiple": True,
        "gcs_address": f"127.0.0.1:{port}", "head_node_id": HEAD_ID,
    }  # fmt: skip
    return {
        **{name: [] for name in lists}, "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        "cluster_name": "scaling", "max_workers": 3, "upscaling_speed": 1000, "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider, "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def scaling(tmp_path_factory) -> Iterator[Scaling]:
    cluster = Scaling(tmp_path_factory.mktemp("scaling"))
    yield cluster
    cluster.node.end()


@pytest.fixture
def job(place) -> Path:
    return place / "job.yaml"


def test_a_gang_brings_its_machines_at_once_says_what_is_coming_and_they_go_when_nobody_wants_them(scaling, job):
    assert scaling.machines() == 0
    said = scaling.run(job, "resources.workers=2")
    assert "2 workers wanted, each with one CPU; the cluster has 0 CPU (0 free); coming: " in said
    assert "coming: 2 small" in said  # both at a time
    assert "sft: done; the model is in" in said
    until(lambda: scaling.machines() == 0, lambda: scaling.dashboard.nodes())


def test_what_can_never_come_is_told_at_once(scaling, job):
    said = scaling.run(job, "name=toolarge", "resources.workers=4", status=2)
    assert "resources.workers: the cluster cannot grow so far: 4 workers wanted, each with one CPU" in said
    assert scaling.machines() == 0


def test_fewer_workers_will_do_if_the_job_says_so(scaling, job):
    said = scaling.run(job, "name=fewer", "resources.workers=4", "resources.min_workers=2")
    assert "asking for 2, resources.min_workers" in said
    assert "sft: done; the model is in" in said
