"""Machines of a cloud whose head is gone end themselves; one whose head was only slow does not. Real processes;
shutting down is a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import orphan_watch
from cluster.orphan_watch import answers, silence
from cluster.providers import azure
from cluster.ray_node import Node, head_arguments, new_mark
from cluster.remote_shell import HERE, free_port
from launcher.submit import clusters
from tests.launcher.submit.test_clusters import CONFIGS

_PATIENCE_S = 60
_HEAD = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"\\0\\0\\0\\4\\0\\0\\0\\0\\0" if sys.argv[2] == "gcs" else b"-ERR unknown command\\r\\n")
    print("seen", flush=True)
    connection.close()
"""
"""A port that begins as Ray's GCS does (an HTTP/2 SETTINGS frame), or as Redis, which has the same port."""


def until(seen: Callable[[], bool], told: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not seen():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


class Head:
    """A process that listens where the GCS would."""

    def __init__(self, folder: Path, speaks: str = "gcs"):
        self.port, self.log = free_port(), folder / "head.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", _HEAD, str(self.port), speaks], stdout=log)
        until(lambda: "listening" in self.log.read_text(), self.log.read_text)

    def looks(self) -> int:
        return self.log.read_text().count("seen")

    def await_look(self) -> None:
        """Until one more look at it has been answered from its beginning on."""
        before = self.looks()
        until(lambda: self.looks() > before + 1, self.log.read_text)


class Machine:
    """A machine for workers: a home with the watch in it, and a file that is there once it has ended."""

    def __init__(self, folder: Path):
        self.home = folder / "machine"
        (self.home / ".muster").mkdir(parents=True)
        self.program = Path(shutil.copy(orphan_watch.__file__, self.home / ".muster/orphan_watch.py"))
        self.off, self.log = self.home / "off", self.home / "log"
        self.started: list[subprocess.Popen] = []

    def watch(self, port: int, *, seconds: float, timeout: float = 3, end: tuple[str, ...] = ()) -> subprocess.Popen:
        limits = ["--minutes", str(seconds / 60), "--every", "0.1", "--timeout", str(timeout)]
        command = [
            sys.executable,
            str(self.program),
            f"127.0.0.1:{port}",
            *limits,
            "--",
            *(end or ("touch", str(self.off))),
        ]
        with self.log.open("a") as log:
            environment = {**os.environ, "HOME": str(self.home)}
            self.started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return self.started[-1]

    def watching(self) -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if str(self.program) in (each.info["cmdline"] or [])]


@pytest.fixture
def head(tmp_path) -> Iterator[Head]:
    head = Head(tmp_path)
    yield head
    head.process.kill()
    head.process.wait()


@pytest.fixture
def machine(tmp_path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for process in machine.watching():
        process.kill()
    for started in machine.started:
        started.wait()


def test_time_without_the_head_is_counted_from_when_it_was_last_seen_and_pauses_of_the_machine_are_not_counted():
    assert silence(0, 15, seen=False, longest_round_s=45) == 15
    assert silence(600, 15, seen=False, longest_round_s=45) == 615
    assert silence(890, 15, seen=True, longest_round_s=45) == 0
    assert silence(0, 3600, seen=False, longest_round_s=45) == 45  # the machine was stopped for an hour


def test_a_machine_whose_head_is_gone_ends_itself_and_says_why(head, machine):
    watch = machine.watch(head.port, seconds=1.5)
    until(lambda: head.looks() > 20)  # it has watched for longer than that
    assert not machine.off.exists()
    head.process.kill()
    until(machine.off.exists, machine.log.read_text)
    assert f"the head 127.0.0.1:{head.port} did not answer for 0.025 minutes; this machine ends itself: touch" in (
        machine.log.read_text()
    )
    assert watch.poll() is None  # should the machine not end, it is ended again
    machine.off.unlink()
    until(machine.off.exists, machine.log.read_text)


def test_a_head_that_was_only_slow_loses_nobody_and_one_that_hangs_for_good_is_gone(head, machine):
    machine.watch(head.port, seconds=4, timeout=0.5)
    for _ in range(5):  # 4.5 s in all
        head.process.send_signal(signal.SIGSTOP)
        time.sleep(0.9)
        head.process.send_signal(signal.SIGCONT)
        head.await_look()
    assert not machine.off.exists(), machine.log.read_text()
    head.process.send_signal(signal.SIGSTOP)  # the kernel goes on accepting connections for it
    until(machine.off.exists, machine.log.read_text)


def test_another_program_at_the_heads_address_is_not_the_head(tmp_path, machine):
    other = Head(tmp_path, speaks="redis")
    try:
        assert not answers("127.0.0.1", other.port, 5)
        machine.watch(other.port, seconds=1)
        until(machine.off.exists, machine.log.read_text)
    finally:
        other.process.kill()
        other.process.wait()


def test_a_machine_that_does_not_end_says_so_and_tries_again(head, machine):
    head.process.kill()
    script = f"[ -e {machine.home}/tried ] && touch {machine.off}; touch {machine.home}/tried; [ -e {machine.off} ]"
    machine.watch(head.port, seconds=0.5, end=("bash", "-c", script))
    until(machine.off.exists, machine.log.read_text)
    assert "this machine did not end: exit status 1; trying again" in machine.log.read_text()


def test_what_a_cloud_cluster_runs_watches_once_and_outlives_the_shell_that_started_it(head, machine, tmp_path):
    config = yaml.safe_load(clusters.render(CONFIGS / "aws.yaml"))
    assert config["file_mounts"]["~/.muster/orphan_watch.py"] == orphan_watch.__file__
    first, start = config["worker_setup_commands"][0], config["worker_start_ray_commands"][0]
    at_start = next(step for step in start.split("; ") if "orphan_watch" in step)
    assert at_start == first.replace("python3", "python")
    assert start.index("orphan_watch") < start.index("ray start")
    assert "orphan_watch" not in json.dumps([config["head_setup_commands"], config["head_start_ray_commands"]])
    assert first.count("sudo -n shutdown -h now") == 1

    short = first.replace(":6379", f":{head.port}").replace("--minutes 15", "--minutes 0.02 --every 0.1 --timeout 3")
    command = short.replace("sudo -n shutdown -h now", f"touch {machine.off}").replace("python3", sys.executable)
    environment = {**os.environ, "HOME": str(machine.home), "RAY_HEAD_IP": "127.0.0.1"}
    for _ in range(2):
        shell = subprocess.Popen(
            ["bash", "-c", f"{command}; sleep 60"], env=environment, start_new_session=True, cwd=tmp_path
        )
        until(lambda: len(machine.watching()) == 1)
        head.await_look()
        os.killpg(shell.pid, signal.SIGHUP)
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(_PATIENCE_S)
    head.await_look()
    assert len(machine.watching()) == 1
    log = machine.home / ".muster/orphan_watch.log"
    assert log.read_text().count("watching the head") == 1
    head.process.kill()
    until(machine.off.exists, log.read_text)


@pytest.mark.parametrize("never", ["0", "null"])
def test_machines_that_are_never_to_end_themselves_do_not_watch(never, tmp_path):
    (tmp_path / "c.yaml").write_text((CONFIGS / "aws.yaml").read_text() + f"orphan_minutes: {never}\n")
    assert "orphan_watch" not in clusters.render(tmp_path / "c.yaml")


def test_minutes_below_nought_are_refused(tmp_path, muster):
    (tmp_path / "c.yaml").write_text(
        "provider: gcp\nproject: p\nzone: z-a\nhead: {instance: n}\norphan_minutes: -1\npools: {a: {instance: n, max: "
        "1, cpus: 1}}\n"
    )
    answer = muster("cluster", "render", str(tmp_path / "c.yaml"))
    assert answer.status == 2
    assert answer.errors[0].startswith(f"{tmp_path}/c.yaml:5: orphan_minutes: ")


class _Azure(BaseHTTPRequestHandler):
    """The metadata service of a machine and the API, as far as a machine needs them to give itself back."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        known = {
            "/metadata/identity/oauth2/token": b'{"access_token": "secret"}',
            "/metadata/instance/compute/resourceId": b"/subscriptions/s/virtualMachines/m",
        }
        found = known.get(self.path.partition("?")[0]) if self.headers["Metadata"] == "true" else None
        self.send_response(404 if found is None else 200)
        self.end_headers()
        self.wfile.write(found or b"")

    def do_POST(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(202)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_a_machine_of_azure_has_itself_deallocated_since_one_that_only_shuts_down_is_paid_for():
    _Azure.asked = []
    with HTTPServer(("127.0.0.1", 0), _Azure) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        script = azure.DEALLOCATE.replace(azure.METADATA, f"{here}/metadata").replace(azure.MANAGEMENT, here)
        subprocess.run(["bash", "-c", script], check=True, timeout=_PATIENCE_S, capture_output=True)
        assert _Azure.asked == [
            ("/subscriptions/s/virtualMachines/m/deallocate?api-version=2024-07-01", "Bearer secret")
        ]
        broken = subprocess.run(["bash", "-c", script.replace("resourceId", "x")], check=False, capture_output=True)
        server.shutdown()
    assert broken.returncode
    assert len(_Azure.asked) == 1


@pytest.mark.cpu
def test_rays_own_gcs_is_seen_while_it_is_there_and_missed_when_it_is_gone(machine, monkeypatch):
    mark, port = new_mark(), free_port()
    node = Node(HERE, sys.executable, mark)
    arguments = [
        *head_arguments("127.0.0.1", port, free_port()), f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", "--num-cpus=0",
    ]  # fmt: skip
    try:
        node.start(node.script(arguments), "a" * 64)
        assert answers("127.0.0.1", port, 10)
        machine.watch(port, seconds=3, timeout=1)
        (gcs,) = [
            one
            for one in psutil.process_iter(["cmdline"])
            if f"--gcs_server_port={port}" in (one.info["cmdline"] or [])
        ]
        gcs.suspend()
        assert not answers("127.0.0.1", port, 1)
        gcs.resume()
        until(lambda: answers("127.0.0.1", port, 1))
        assert not machine.off.exists()
    finally:
        node.end()
    until(machine.off.exists, machine.log.read_text)
