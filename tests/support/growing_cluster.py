"""A cluster on this machine that grows and shrinks by itself: Ray's own autoscaler,
with a provider of Ray's whose machines are processes."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.dashboard import Dashboard
from cluster.ray_node import PRICE, Node, head_arguments, new_mark
from cluster.remote_shell import HERE, free_port

HEAD_ID = "f" * 51 + "00000"
"""The provider knows the head by it."""


class GrowingCluster:
    """A head without places for workers; there may be three machines of one place each."""

    def __init__(self, folder: Path, idle_minutes: float = 0.1):
        self.node = Node(HERE, sys.executable, new_mark())
        port, dashboard = free_port(), free_port()
        token = secrets.token_hex(32)
        (folder / "token").write_text(token)
        (folder / "autoscaler.yaml").write_text(yaml.safe_dump(_config(port, idle_minutes)))
        ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
        arguments = [*head_arguments("127.0.0.1", port, dashboard), "--num-cpus=0", "--num-gpus=0", *ports]
        arguments.append(f"--autoscaling-config={folder / 'autoscaler.yaml'}")
        environment = {
            "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        }  # fmt: skip
        self.node.start(self.node.script(arguments, environment=environment), token)
        self.address, self.token = f"http://127.0.0.1:{dashboard}", token
        self.dashboard = Dashboard(self.address, token, "the cluster")
        self.file = folder / "there.yaml"
        """A cluster file, for --on."""
        spec = {"provider": "existing", "address": self.address, "token_file": str(folder / "token"), "shared": ["/"]}
        self.file.write_text(json.dumps(spec))

    def machines(self) -> int:
        """That are up, beside the head."""
        return len(self.dashboard.nodes()) - 1

    def end(self) -> None:
        self.node.end()


def _config(port: int, idle_minutes: float) -> dict[str, Any]:
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
        **{name: [] for name in lists},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_name": "scaling",
        "max_workers": 3,
        "upscaling_speed": 1000,
        "idle_timeout_minutes": idle_minutes,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {
                "resources": {"CPU": 1},
                "labels": {PRICE: "2"},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 3,
            },
        },
    }
