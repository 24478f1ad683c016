"""Whether a Ray cluster answers at RAY_ADDRESS. Ray itself tries for minutes, and then ends the process."""

from __future__ import annotations

import os
import socket

from training.errors import InputError
from training.io.time_limit import within

PATIENCE_S = 20.0
"""For everything together: the name, the connection, the first bytes."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2, and so of gRPC, sends first: the preface of RFC 9113, 3.4, and an empty SETTINGS frame."""
_FRAME_HEADER_BYTES, _TYPE, _SETTINGS = 9, 3, 4


def check(address: str) -> None:
    """Raises InputError unless a server that speaks Ray's protocol, which is gRPC, answers there.
    Other forms, such as `auto`, Ray checks."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        within(PATIENCE_S, lambda: _greet(host.strip("[]"), int(port)))
    except (OSError, ValueError, OverflowError) as error:  # of names and ports that are none, too
        message = (
            f"no Ray cluster answers there ({error}); start one, correct RAY_ADDRESS, or unset it to run on this "
            "machine"
        )
        raise InputError.of(f"RAY_ADDRESS={address}", message) from error


def _greet(host: str, port: int) -> None:
    with socket.create_connection((host, port), timeout=PATIENCE_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("", "0", "false"):
            return  # what is said there is encrypted
        connection.sendall(_PREFACE)
        answer = b""
        while len(answer) < _FRAME_HEADER_BYTES and (more := connection.recv(_FRAME_HEADER_BYTES - len(answer))):
            answer += more
    if len(answer) < _FRAME_HEADER_BYTES or answer[_TYPE] != _SETTINGS:
        raise ConnectionError("what answers does not speak Ray's protocol")
