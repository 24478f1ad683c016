"""What the cloud providers rely on in Ray's cluster launcher without a promise, in the version that is installed."""

from __future__ import annotations

import inspect

from cluster.providers import ray_launcher_compat


def test_rays_launcher_calls_ssh_with_the_options_of_the_block_and_afterwards_with_its_own():
    from ray.autoscaler._private import command_runner

    own = command_runner.SSHOptions
    with ray_launcher_compat.ssh_options({"StrictHostKeyChecking": "accept-new"}):
        options = command_runner.SSHOptions("/key", "/control").to_ssh_options_list(timeout=10)
    assert "StrictHostKeyChecking=accept-new" in options
    assert "StrictHostKeyChecking=no" not in options
    assert command_runner.SSHOptions is own


def test_the_node_provider_is_made_from_two_parts_of_a_cluster_file():
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.node_provider import NodeProvider

    assert {"provider_config", "cluster_name", "use_cache"} == inspect.signature(_get_node_provider).parameters.keys()
    for method in ("non_terminated_nodes", "node_tags", "internal_ip", "terminate_nodes"):
        assert callable(getattr(NodeProvider, method))
