"""What is left in a cloud of a cluster whose head is gone: found by its tags, priced, ended.
moto answers as EC2 would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import registry as homes
from cluster.providers.aws import AwsProvider
from cluster.remote_shell import free_port
from cluster.spec import Aws
from tests.cluster.test_orphan_watch import until

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
SPEC = {
    "provider": "aws",
    "name": "cloud",
    "region": "us-west-2",
    "image": "ami-03cf127a",
    "user": "root",
    "instance_profile": "trainer",
    "head": {"instance": "m5.2xlarge", "price": 0.5},
    "pools": {
        "big": {
            "instance": "p4d.24xlarge",
            "max": 2,
            "cpus": 1,
            "market": "spot-first",
            "spot_price": 11.5,
            "price": 22,
        }
    },
}


@pytest.fixture(scope="module")
def ec2(tmp_path_factory) -> Iterator[Any]:
    """A client of a server that answers for EC2."""
    out, port = tmp_path_factory.mktemp("ec2") / "state.json", free_port()
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
    credentials = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    with pytest.MonkeyPatch.context() as patch, out.with_suffix(".log").open("w") as log:
        for name, value in {**address, **credentials}.items():
            patch.setenv(name, value)
        command = [sys.executable, str(ROOT / "tests/support/ec2.py"), "127.0.0.1", str(port), str(out)]
        server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
        try:
            until(out.exists, out.with_suffix(".log").read_text)
            import boto3

            yield boto3.client("ec2")
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def config(ec2, tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """Of a cluster with a record and a security group, without machines; what Ray's launcher makes of its file."""
    monkeypatch.setenv("MUSTER_HOME", str(tmp_path / "muster"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where Ray keeps what it has found out of an account
    from ray.autoscaler._private.commands import _bootstrap_config

    home = homes.claim("cloud", {"spec": {**SPEC}, "mark": os.urandom(4).hex(), "started": "now"})
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home.folder / "key")], check=True)
    home.write({**home.record(), "head": "127.0.0.1"})
    yield _bootstrap_config(AwsProvider(Aws.model_validate(SPEC))._recorded(home))
    for name in groups(ec2):
        ec2.delete_security_group(GroupName=name)


@pytest.fixture
def cloud(config) -> Iterator[Any]:
    """A cluster of a head and two spot machines, started as Ray's launcher
    and its autoscaler start them; `cloud("head")`: ids."""
    from ray.autoscaler._private.providers import _get_node_provider

    nodes = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    for kind, role, count in (("head", "head", 1), ("big-spot", "worker", 2)):
        tags = {"ray-node-type": role, "ray-user-node-type": kind, "ray-node-name": kind}
        nodes.create_node(config["available_node_types"][kind]["node_config"], tags, count)
    yield lambda role: nodes.non_terminated_nodes({"ray-node-type": role})
    if left := nodes.non_terminated_nodes({}):
        nodes.terminate_nodes(left)


def states(ec2: Any) -> set[str]:
    found = ec2.describe_instances()["Reservations"]
    return {one["State"]["Name"] for group in found for one in group["Instances"]}


def groups(ec2: Any) -> list[str]:
    return [
        group["GroupName"]
        for group in ec2.describe_security_groups()["SecurityGroups"]
        if "muster" in group["GroupName"]
    ]


def test_machines_are_started_so_that_a_shutdown_terminates_them(ec2, cloud):
    for machine in [*cloud("head"), *cloud("worker")]:
        answer = ec2.describe_instance_attribute(InstanceId=machine, Attribute="instanceInitiatedShutdownBehavior")
        assert answer["InstanceInitiatedShutdownBehavior"] == {"Value": "terminate"}


def test_what_is_left_without_its_head_is_found_by_tags_priced_and_ended(ec2, cloud, muster):
    ec2.terminate_instances(InstanceIds=cloud("head"))
    workers = cloud("worker")
    lines = muster("cluster", "status", "cloud").out.splitlines()
    assert lines[0].startswith("cloud: silent, aws, since now, 0 machines")
    assert "  the cloud still has 2 of its machines, 23.00 an hour; `muster cluster down cloud` ends them:" in lines
    assert {line.split()[0] for line in lines if "worker of big-spot" in line} == set(workers)
    (info,) = json.loads(muster("cluster", "status", "--json").out)
    assert (info["price_per_hour"], info["unpriced"], len(info["instances"])) == (23.0, 0, 2)

    ec2.stop_instances(InstanceIds=workers[:1])  # as one that was shut down, where that does not terminate
    said = muster("cluster", "status", "cloud").out
    assert "2 of its machines, 11.50 an hour" in said
    assert f"{workers[0]}" in next(line for line in said.splitlines() if "stopped, but its disk still exists" in line)

    assert len(groups(ec2)) == 1
    answer = muster("cluster", "down", "cloud")
    assert (answer.status, answer.out.splitlines()[-1]) == (0, "cloud is down"), answer.err
    assert states(ec2) == {"terminated"}  # also the one that was stopped
    assert groups(ec2) == []
    assert homes.known() == []


def test_a_cluster_whose_machines_have_all_ended_and_are_forgotten_is_taken_down_at_once(ec2, config, muster):
    assert "the cloud has no more machines of this cluster" in muster("cluster", "status").out
    answer = muster("cluster", "down", "cloud")
    assert answer.status == 0, answer.err
    assert "waiting for the machines" not in answer.out
    assert groups(ec2) == []
    assert homes.known() == []


def test_a_cloud_that_does_not_answer_is_told_beside_the_head_that_does_not(cloud, muster, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    said = muster("cluster", "status", "cloud").out
    assert "no SSH tunnel to 127.0.0.1" in said
    assert "the cloud does not say which machines there are: " in said
