"""What the cloud providers use of Ray's cluster launcher that Ray does not promise: private names, one function each.

tests/cluster/test_ray_launcher_compat.py says what each relies on. Loads Ray late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def node_provider(config: Mapping[str, Any]) -> Any:
    """Ray's node provider for a cluster file: the cloud's machines that have the cluster's tag.

    Private: `ray.autoscaler._private.providers._get_node_provider`; of what it returns `non_terminated_nodes`,
    `node_tags`, `internal_ip` and `terminate_nodes` are Ray's public interface of providers.
    """
    from ray.autoscaler._private.providers import _get_node_provider

    return _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)


@contextmanager
def ssh_options(options: Mapping[str, str]) -> Iterator[None]:
    """In the block Ray's launcher calls ssh with these options in place of its own; it has no setting for them.

    Private: the class `ray.autoscaler._private.command_runner.SSHOptions`, replaced for the length of the block.
    """
    from ray.autoscaler._private import command_runner

    module: Any = command_runner
    own: Any = module.SSHOptions

    class WithOptions(own):  # type: ignore[misc]  # a class of an untyped module
        def __init__(self, ssh_key: Any, control_path: Any = None, **given: Any):
            super().__init__(ssh_key, control_path, **options, **given)

    module.SSHOptions = WithOptions
    try:
        yield
    finally:
        module.SSHOptions = own
