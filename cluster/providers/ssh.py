"""Your own machines, through SSH: Ray is started on each, the head first; drivers of jobs run on the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from cluster.dashboard import Dashboard
from cluster.providers import Finding, Say, environment, findings_of, refuse
from cluster.ray_node import Node, head_arguments, places, price_label
from cluster.registry import ClusterRecord
from cluster.remote_shell import Login, all_of, on_all, over_ssh
from cluster.spec import Machines, Ssh
from cluster.tunnel import tunnel


class SshProvider:
    def __init__(self, spec: Ssh):
        self.spec = spec
        self.login = Login(spec.user, spec.ssh_port, spec.key, spec.ssh_options)
        self.pool_of = {host: pool for pool in spec.pools.values() for host in pool.hosts}

    def render(self) -> str:
        return "\n\n".join(f"# {host}\n{script}" for host, script in self._scripts("MARK").items()) + "\n"

    def _scripts(self, cluster_id: str, head: str = "") -> dict[str, str]:
        """What is done on every machine, the head first. `head`: its address for the others,
        if it is known better than from here."""
        address = head or self.spec.head.address or self.spec.head.host
        arguments = {self.spec.head.host: self._head_arguments(address)}
        arguments |= {host: self._worker_arguments(address, pool) for host, pool in self.pool_of.items()}
        return {
            host: self._node(host, cluster_id).script(own, setup=self.spec.setup, environment=environment(self.spec))
            for host, own in arguments.items()
        }

    def up(self, home: ClusterRecord, say: Say) -> None:
        say(f"checking {len(self.spec.hosts)} machines")
        refuse(self.doctor())
        cluster_id, token = home.record()["mark"], home.token()
        head = self.spec.head.address or self._node(self.spec.head.host).look()["address"]
        (first, script), *others = self._scripts(cluster_id, head).items()
        say(f"starting Ray on {first}")
        self._node(first, cluster_id).start(script, token)
        say(f"starting Ray on {len(others)} worker machines")
        all_of(on_all({host: partial(self._node(host, cluster_id).start, script, token) for host, script in others}))

    def down(self, home: ClusterRecord, say: Say) -> None:
        cluster_id = home.record()["mark"]
        say(f"ending Ray on {len(self.spec.hosts)} machines")
        all_of(on_all({host: self._node(host, cluster_id).end for host in reversed(self.spec.hosts)}))

    @contextmanager
    def connection(self, home: ClusterRecord | None) -> Iterator[Dashboard]:
        assert home is not None, "a cluster that Muster made has a record"
        with tunnel(self.spec.head.host, self.login, "127.0.0.1", self.spec.dashboard_port) as port:
            yield Dashboard(f"http://127.0.0.1:{port}", home.token(), f"the cluster {home.name}")

    def doctor(self) -> list[Finding]:
        return findings_of({host: self._node(host).look for host in self.spec.hosts})

    def _node(self, host: str, cluster_id: str = "") -> Node:
        return Node(over_ssh(host, self.login), self.spec.python, cluster_id)

    def _head_arguments(self, address: str) -> list[str]:
        head = self.spec.head
        return [
            *head_arguments(address, self.spec.port, self.spec.dashboard_port),
            *places(head.cpus, head.gpus, labels=price_label(head.price)),
        ]

    def _worker_arguments(self, head: str, pool: Machines) -> list[str]:
        return [
            f"--address={head}:{self.spec.port}",
            *places(pool.cpus, pool.gpus, pool.gpu, pool.labels | price_label(pool.price)),
        ]


PROVIDER = SshProvider
