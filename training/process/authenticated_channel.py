"""Connections whose two ends prove that they have the same key, and whose frames nobody else can write,
change, repeat or leave out.

Handshake: the server sends a challenge, the client a nonce and its proof, the server its own proof. After that both
send frames: the length of the payload (4 bytes, big-endian), its tag, the payload. Proofs and tags are HMAC-SHA256.
Nothing is encrypted.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from collections.abc import Iterable

KEY_BYTES = 32
NONCE_BYTES = 32
TAG_BYTES = 32
LARGEST_PAYLOAD = 1 << 26
"""Bytes."""
_HEADER = struct.Struct(f">I{TAG_BYTES}s")
_LENGTH = struct.Struct(">I")


class NotAuthentic(ConnectionError):
    """What came over a connection was not sent by somebody who has the key."""


class Session:
    """What both ends derive from the key and the random numbers of their handshake."""

    def __init__(self, key: bytes, challenge: bytes, nonce: bytes):
        if len(key) < KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes; {KEY_BYTES} are needed")
        derived = [
            hmac.digest(key, label + challenge + nonce, "sha256")
            for label in (b"client proof", b"server proof", b"requests", b"answers")
        ]
        self.client_proof, self.server_proof = derived[:2]
        self.requests, self.answers = map(Frames, derived[2:])


class Frames:
    """One direction of a connection. The number of a frame is part of its tag."""

    def __init__(self, key: bytes):
        self._key = key
        self._count = 0

    def pack(self, payload: bytes) -> bytes:
        """Raises ValueError for a payload that is too large."""
        if len(payload) > LARGEST_PAYLOAD:
            raise ValueError(f"a payload of {len(payload)} bytes; {LARGEST_PAYLOAD} are allowed")
        return _HEADER.pack(len(payload), self._tag(payload)) + payload

    def unpack(self, received: bytearray) -> bytes | None:
        """Take the first payload from what was received; None if it is not complete. Raises NotAuthentic."""
        if len(received) < _HEADER.size:
            return None
        length, tag = _HEADER.unpack_from(received)
        if length > LARGEST_PAYLOAD:
            raise NotAuthentic(f"a frame of {length} bytes")
        end = _HEADER.size + length
        if len(received) < end:
            return None
        payload = bytes(received[_HEADER.size : end])
        if not hmac.compare_digest(tag, self._tag(payload)):
            raise NotAuthentic("a frame with a wrong tag")
        del received[:end]
        return payload

    def _tag(self, payload: bytes) -> bytes:
        self._count += 1
        return hmac.digest(self._key, self._count.to_bytes(8, "big") + payload, "sha256")


class Connection:
    """A client's end. Raises OSError (NotAuthentic, TimeoutError) when it cannot be used, or no longer."""

    def __init__(self, host: str, port: int, key: bytes, timeout_s: float | None):
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._received = bytearray()
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect((host, port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._session = self._shake_hands(key)
        except BaseException:
            self.close()
            raise

    def _shake_hands(self, key: bytes) -> Session:
        challenge, nonce = self._receive(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
        session = Session(key, challenge, nonce)
        self._socket.sendall(nonce + session.client_proof)
        if not hmac.compare_digest(self._receive(TAG_BYTES), session.server_proof):
            raise NotAuthentic("the server does not have the key")
        return session

    def ask(self, request: Iterable[bytes], timeout_s: float | None) -> list[bytes]:
        """The server's answer. After an error the connection is of no more use: an answer may still be on its way."""
        self._socket.settimeout(timeout_s)
        self._socket.sendall(self._session.requests.pack(pack(request)))
        while (payload := self._session.answers.unpack(self._received)) is None:
            self._receive_more()
        return unpack(payload)

    def _receive(self, count: int) -> bytes:
        while len(self._received) < count:
            self._receive_more()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _receive_more(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("Connection closed by peer")
        self._received += data

    def close(self) -> None:
        self._socket.close()


def pack(parts: Iterable[bytes]) -> bytes:
    """Byte strings as one payload."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack(payload: bytes) -> list[bytes]:
    """The byte strings of a payload. Raises ValueError if it is not one of `pack`."""
    parts, start = [], 0
    while start < len(payload):
        if start + _LENGTH.size > len(payload):
            raise ValueError("a payload that ends within a length")
        (length,) = _LENGTH.unpack_from(payload, start)
        start += _LENGTH.size + length
        parts.append(payload[start - length : start])
    if start != len(payload):
        raise ValueError("a payload that ends within a part")
    return parts
