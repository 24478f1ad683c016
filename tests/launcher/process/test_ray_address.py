"""What answers, or does not, at RAY_ADDRESS: an end in words before Ray tries for minutes."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.process import ray_address
from training.errors import InputError


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does `serve` with its first connection and holds that until the block ends."""
    ended = threading.Event()

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            serve(connection)
            ended.wait()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=run, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()


def nothing(connection: socket.socket) -> None: ...


def drip(connection: socket.socket) -> None:
    connection.send(b"\0\0")


def another_protocol(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (nothing, "no answer within|timed out"),
        (drip, "no answer within|timed out"),
        (another_protocol, "Ray's protocol"),
    ],
)
def test_a_server_that_does_not_speak_as_ray_does_is_refused(monkeypatch, serve, words):
    monkeypatch.setattr(ray_address, "PATIENCE_S", 0.5)
    with serving(serve) as address, pytest.raises(InputError, match=rf"RAY_ADDRESS={address}: .*({words})"):
        ray_address.check(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999", f"{'x' * 70}.invalid:6379"])
def test_an_address_of_nobody_is_refused(address):
    with pytest.raises(InputError, match=r"no Ray cluster answers there"):
        ray_address.check(address)


@pytest.mark.parametrize("address", ["auto", "local"])
def test_other_forms_are_left_to_ray(address):
    ray_address.check(address)


@pytest.mark.cpu
def test_ray_answers(ray_cluster):
    import ray

    ray_address.check(ray.get_runtime_context().gcs_address)


@pytest.mark.faults
@pytest.mark.parametrize(
    "verb",
    [("run", "job.yaml"), ("generate", "model", "--file", "data/train.jsonl", "--out", "out.jsonl", "--workers", "2")],
    ids=lambda verb: verb[0],
)
@pytest.mark.cpu
def test_a_command_ends_with_status_2_where_nobody_speaks(place, monkeypatch, verb):
    command = [str(Path(sys.executable).with_name("muster")), *verb]
    with serving(nothing) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        ended = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"RAY_ADDRESS={address}: no Ray cluster answers there (")
    assert "Traceback" not in ended.stderr
