"""A real server on loopback that reads a request of HTTP and then sends any bytes at all,
and replies that no good server sends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Reply = bytes | Callable[[socket.socket, threading.Event], None]
"""What is sent before the connection is closed, or what sends it until the event."""
OK = b"HTTP/1.1 200 OK\r\n"


def whole(value: Any) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def dripping(start: bytes) -> Reply:
    """One byte now and then for ever, after `start`: no pause is as long as any time limit."""

    def drip(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(start)
        while not ended.wait(0.05):
            connection.sendall(b"x")

    return drip


CUT: dict[str, bytes] = {
    "nothing": b"",
    "a status line that is cut": b"HTTP/1.1 20",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "headers that are cut": OK + b"Content-Le",
    "a body that is cut": OK + b'Content-Length: 1000\r\n\r\n{"scores": [',
    "a body of a quintillion bytes": OK + b"Content-Length: 1000000000000000000\r\n\r\n{",
    "a chunk that is cut": OK + b"Transfer-Encoding: chunked\r\n\r\n40\r\n{",
    "a chunk of no length": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a chunk of any length": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n{}\r\n",
    "no chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n",
    "a header without end": OK + b"X: " + b"x" * 100_000,
    "headers without end": OK + b"".join(b"X-%d: x\r\n" % n for n in range(300)) + b"\r\n",
}
"""Replies that end in their middle, or were none."""
DRIPPING = {"headers": dripping(OK + b"X: "), "a body": dripping(OK + b"Content-Length: 100000\r\n\r\n")}
ODD_JSON: dict[str, bytes] = {
    "no JSON": b"<html>welcome</html>",
    "nested too deeply": b"[" * 200_000,
    "a number of too many digits": b"1" * 10_000,
    "bytes that are no text": b'"\xff"',
    "a list": b"[]",
    "null": b"null",
}


class RawServer:
    """`with RawServer(first, second) as server:` each connection gets the next reply; the last one is repeated."""

    def __init__(self, *replies: Reply):
        self.replies = list(replies)
        self.asked = 0

    def __enter__(self) -> RawServer:
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                reply = self.replies[min(self.asked, len(self.replies) - 1)]
                self.asked += 1
                threading.Thread(target=self._answer, args=(connection, reply), daemon=True).start()

    def _answer(self, connection: socket.socket, reply: Reply) -> None:
        with suppress(OSError), connection:
            _read_request(connection)
            if isinstance(reply, bytes):
                connection.sendall(reply)
            else:
                reply(connection, self._ended)


def _read_request(connection: socket.socket) -> None:
    with connection.makefile("rb") as lines:
        length = 0
        while (line := lines.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        lines.read(length)
