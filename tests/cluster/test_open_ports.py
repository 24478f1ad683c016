"""What a machine of a cluster shows to whoever reaches it: nothing without the token,
also no figures for Prometheus."""

from __future__ import annotations

import http.client
import sys
import time
from contextlib import suppress

import psutil
import pytest

from cluster.providers import environment
from cluster.ray_node import Node, head_arguments, new_mark
from cluster.remote_shell import HERE, free_port
from cluster.spec import Local

pytestmark = pytest.mark.cpu
ADDRESS = "127.0.0.2"
"""Loopback for the kernel, and none of the names of loopback for Ray: it behaves as on a machine with a network."""


def listening(mark: str) -> set[tuple[str, int]]:
    """Address and port of every process that was started with a mark."""
    found: set[tuple[str, int]] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("MUSTER_CLUSTER") == mark:
                sockets = process.net_connections("tcp")
                found |= {(c.laddr.ip, c.laddr.port) for c in sockets if c.status == psutil.CONN_LISTEN}
    return found


def figures(port: int) -> bool:
    """Whether a port serves figures to somebody without a token."""
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=2)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return answer.status == 200 and b"# HELP" in answer.read()
    return False


def test_no_port_serves_figures_to_everybody(monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    mark = new_mark()
    node = Node(HERE, sys.executable, mark)
    arguments = [
        *head_arguments(ADDRESS, free_port(), free_port()), f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", "--num-cpus=1",
    ]  # fmt: skip
    spec = Local(provider="local", name="here")
    try:
        node.start(node.script(arguments, environment=environment(spec)), "a" * 64)
        deadline = time.monotonic() + 60  # its agents listen a moment after it is there
        while len(ports := listening(mark)) <= 4:
            assert time.monotonic() < deadline, f"the ports of Ray are not seen: {ports}"
            time.sleep(0.2)
        assert not [port for _, port in ports if figures(port)]
    finally:
        node.end()
