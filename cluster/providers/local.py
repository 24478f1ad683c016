"""Ray on this machine, bound to loopback, so that several jobs can share one Ray instance."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.dashboard import Dashboard
from cluster.providers import Finding, Say, environment, findings_of
from cluster.ray_node import Node, head_arguments, places
from cluster.registry import ClusterRecord
from cluster.remote_shell import HERE, free_port
from cluster.spec import Local
from cluster.tunnel import refuse_strangers_port

_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Where Ray does not expect other hosts it binds every port to loopback; the name speaks of other systems."""


class LocalProvider:
    def __init__(self, spec: Local):
        self.spec = spec

    def _arguments(self, port: int, dashboard_port: int) -> list[str]:
        return [*head_arguments("127.0.0.1", port, dashboard_port), *places(self.spec.cpus, self.spec.gpus)]

    def render(self) -> str:
        return f"# on this machine, with free ports\n{self._script(self._node('MARK'), self._arguments(6379, 8265))}\n"

    def _script(self, node: Node, arguments: list[str]) -> str:
        return node.script(arguments, environment={**_LOOPBACK, **environment(self.spec)})

    def up(self, home: ClusterRecord, say: Say) -> None:
        port, dashboard_port = free_port(), free_port()
        home.write({**home.record(), "dashboard_port": dashboard_port})
        say("starting Ray on this machine")
        arguments = self._arguments(port, dashboard_port)
        # Another Ray on this machine has the usual ones.
        arguments += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        node = self._node(home.record()["mark"])
        node.start(self._script(node, arguments), home.token())

    def down(self, home: ClusterRecord, say: Say) -> None:
        say("ending Ray on this machine")
        self._node(home.record()["mark"]).end()

    @contextmanager
    def connection(self, home: ClusterRecord | None) -> Iterator[Dashboard]:
        assert home is not None, "a cluster that Muster made has a record"
        port, shown = home.record()["dashboard_port"], f"the cluster {home.name}"
        refuse_strangers_port(port, shown)
        yield Dashboard(f"http://127.0.0.1:{port}", home.token(), shown)

    def doctor(self) -> list[Finding]:
        return findings_of({"this machine": self._node("").look})

    def _node(self, cluster_id: str) -> Node:
        return Node(HERE, sys.executable, cluster_id)


PROVIDER = LocalProvider
