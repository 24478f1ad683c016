"""A real S3 server on loopback (moto), behind a proxy that can refuse, cut, lose, slow down and go away."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest

_START_S = 60
_CHUNK = 1 << 16
_REFUSAL = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_numbers = itertools.count(1)


@dataclass
class _Fault:
    """What is done to the next `times` requests that match."""

    kind: str
    times: int
    method: str | None = None
    key_contains: str = ""
    after: int = 0

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and self.key_contains in path


@dataclass
class Faults:
    """Misbehaviour on demand; all may be changed while requests are under way."""

    proxy: _Proxy
    planned: list[_Fault] = field(default_factory=list)
    rate: float = 0.0
    rng: random.Random = field(default_factory=random.Random)
    bytes_per_s: float | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of everything that was asked."""

    def fail_next(self, times: int, method: str | None = None, key_contains: str = "") -> None:
        """Answer the next requests with 503 Slow Down, without asking the server."""
        self.planned.append(_Fault("fail", times, method, key_contains))

    def fail_rate(self, rate: float, seed: int = 0) -> None:
        """Answer a share of all requests with 503."""
        self.rate, self.rng = rate, random.Random(seed)

    def cut_after(self, count: int, times: int = 1, method: str | None = None, key_contains: str = "") -> None:
        """Reset the connection of the next requests after `count` bytes in either direction."""
        self.planned.append(_Fault("cut", times, method, key_contains, count))

    def lose_answer(self, times: int, method: str | None = None, key_contains: str = "") -> None:
        """Let the server do the next requests, and reset the connection instead of answering."""
        self.planned.append(_Fault("lose", times, method, key_contains))

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Nobody listens within the block, and open connections are reset."""
        self.proxy.stop()
        try:
            yield
        finally:
            self.proxy.start()

    def down(self, seconds: float) -> None:
        """Unreachable from now for some seconds."""
        self.proxy.stop()
        threading.Timer(seconds, self.proxy.start).start()

    def next_for(self, method: str, path: str) -> _Fault | None:
        self.requests.append((method, path))
        for fault in self.planned:
            if fault.matches(method, path):
                fault.times -= 1
                return fault
        return _Fault("fail", 1) if self.rate and self.rng.random() < self.rate else None


class _Proxy:
    """One request a connection: forwarded as it comes, until the server closes."""

    def __init__(self, upstream: int):
        self.upstream = upstream
        self.faults = Faults(self)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._do(self._start())

    def stop(self) -> None:
        """Listen no more and reset what is open."""
        self._do(self._stop())

    def _do(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _start(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self.server.close()
        for writer in list(self.writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.split(b"\r\n")[0].decode().split(" ", 2)
            await self._answer(self.faults.next_for(method, path), head, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _answer(self, fault: _Fault | None, head: bytes, reader, writer) -> None:
        if fault is not None and fault.kind == "fail":
            length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(_REFUSAL)
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\n" + length + _REFUSAL)
            with suppress(TimeoutError):  # what the client is still sending must be read, or it would see a reset
                await asyncio.wait_for(reader.read(-1), 5)
            return
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            first, _, rest = head.partition(b"\r\n")
            to_server.write(first + b"\r\nConnection: close\r\n" + rest)
            budget = [fault.after] if fault is not None and fault.kind == "cut" else None
            lost = fault is not None and fault.kind == "lose"
            sending = asyncio.create_task(self._pass_on(reader, to_server, budget, writer))
            answering = asyncio.create_task(self._pass_on(from_server, None if lost else writer, budget, writer))
            await asyncio.wait([sending, answering], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():  # the client is gone; half a request must not be taken for a whole one
                _reset(to_server)
            sending.cancel()
            await answering
            if lost:
                _reset(writer)
        finally:
            to_server.close()

    async def _pass_on(self, source, target, budget: list[int] | None, client) -> None:
        with suppress(OSError):
            while data := await source.read(_CHUNK):
                if self.faults.bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self.faults.bytes_per_s)
                if budget is not None:
                    budget[0] -= len(data)
                    if budget[0] < 0:
                        _reset(client)
                        return
                if target is None and data.startswith(b"HTTP/1.1 100 "):
                    client.write(data)  # no answer yet, but leave to send the body
                if target is not None:
                    target.write(data)
                    await target.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with RST, not with FIN
    writer.transport.abort()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[_Proxy]:
    """The server, its proxy, and the environment in which clients find it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_end_with_parent
    )
    proxy = _Proxy(port)
    names = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        _wait_for(port)
        yield proxy
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _wait_for(port: int) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end, "the S3 server did not start"
            time.sleep(0.1)


@dataclass
class Bucket:
    """A bucket of one test."""

    url: str
    faults: Faults


@pytest.fixture
def s3(s3_server: _Proxy) -> Bucket:
    """A new bucket, on a server that behaves until it is told otherwise."""
    name = f"bucket-{next(_numbers)}"
    s3_server.faults = Faults(s3_server)
    request = urllib.request.Request(f"http://127.0.0.1:{s3_server.upstream}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    return Bucket(f"s3://{name}", s3_server.faults)
