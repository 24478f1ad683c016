"""The key-value store through which the workers of a process group find each other: its values,
and the thread that serves them.

Lives in worker 0's process. Serves only clients that prove that they have the key of the group
(training/process/authenticated_channel.py); its client is training/process/rendezvous_store.py. The operations are
those of torch.distributed.TCPStore, which lets everybody in.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from training.process.authenticated_channel import NONCE_BYTES, TAG_BYTES, NotAuthentic, Session, pack, unpack

PROOF_S = 10.0
"""Longest time that a client may take to prove that it has the key."""
MOST_UNPROVEN = 1024
"""Connections that have not proved it yet; the oldest is closed for a new one."""
_MOST_WARNINGS = 20
"""Strangers must not fill the disk with them."""
_LOG = logging.getLogger("muster.rendezvous")


class Values:
    """What the store holds. Every operation answers with byte strings; numbers are in decimal digits."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def get(self, *keys: bytes) -> list[bytes]:
        """Raises KeyError for a key that does not exist."""
        return [self._values[key] for key in keys]

    def set(self, key: bytes, value: bytes) -> list[bytes]:
        self._values[key] = value
        return []

    def append(self, key: bytes, value: bytes) -> list[bytes]:
        return self.set(key, self._values.get(key, b"") + value)

    def add(self, key: bytes, amount: bytes) -> list[bytes]:
        self._values[key] = b"%d" % (int(self._values.get(key, b"0")) + int(amount))
        return [self._values[key]]

    def compare_set(self, key: bytes, expected: bytes, desired: bytes) -> list[bytes]:
        """Sets the value if the present one, or for a key that does not exist the empty one, is the expected one."""
        if self._values.get(key, b"") == expected:
            self._values[key] = desired
        return [self._values.get(key, expected)]

    def check(self, *keys: bytes) -> list[bytes]:
        return [b"%d" % all(key in self._values for key in keys)]

    def delete_key(self, key: bytes) -> list[bytes]:
        return [b"%d" % (self._values.pop(key, None) is not None)]

    def num_keys(self) -> list[bytes]:
        return [b"%d" % len(self._values)]


class RendezvousServer:
    """Serves until its process ends. `listener`: a socket that listens already."""

    def __init__(self, listener: socket.socket, key: bytes):
        self._key = key
        self._listener = listener
        self._values = Values()
        self._operations: dict[bytes, Callable[..., list[bytes]]] = {
            name.encode(): getattr(self._values, name)
            for name in ("set", "append", "add", "compare_set", "check", "delete_key", "num_keys")
        }
        self._peers: set[_Peer] = set()
        self._unproven: dict[_Peer, float] = {}
        """Until when each must have proved that it has the key, earliest first."""
        self._waiting: dict[bytes, set[_Peer]] = {}
        """Those who wait for a key."""
        self._warnings_left = _MOST_WARNINGS
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="rendezvous", daemon=True).start()

    def _serve(self) -> None:
        try:
            while True:
                for selected, events in self._selector.select(1.0 if self._unproven else None):
                    if selected.data is None:
                        self._accept()
                    else:
                        self._attend(selected.data, events)
                self._close_unproven()
        finally:  # clients of a server that has failed must not wait
            for selected in list(self._selector.get_map().values()):
                selected.fileobj.close()  # type: ignore[union-attr]  # sockets all of them

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # it has gone already, or there are too many open files
            time.sleep(0.01)
            return
        peer = _Peer(connection, f"{address[0]}:{address[1]}")
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._peers.add(peer)
        self._unproven[peer] = time.monotonic() + PROOF_S
        self._attend(peer, selectors.EVENT_WRITE)

    def _close_unproven(self) -> None:
        """Those that have had their time, and the oldest of too many."""
        while self._unproven:
            peer, deadline = next(iter(self._unproven.items()))
            if time.monotonic() < deadline and len(self._unproven) <= MOST_UNPROVEN:
                return
            self._close(peer, "it did not prove that it belongs to the workers")

    def _attend(self, peer: _Peer, events: int) -> None:
        """Read and write what can be read and written without waiting."""
        if peer not in self._peers:  # closed by what has been done for another one
            return
        try:
            if events & selectors.EVENT_READ:
                peer.receive()
                self._take_requests(peer)
            self._send(peer)
        except EOFError:
            self._close(peer)
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._close(peer, f"{type(error).__name__}: {error}")

    def _take_requests(self, peer: _Peer) -> None:
        if peer.session is None and peer.prove(self._key):
            del self._unproven[peer]
        for name, *arguments in peer.requests():
            if peer.wanted:
                raise NotAuthentic("a request while another one waits")
            if name in (b"get", b"wait"):
                peer.wanted, peer.wants_values = tuple(arguments), name == b"get"
                self._answer_when_there(peer)
            else:
                peer.answer(self._operations[name](*arguments))
                self._wake(arguments[0] if arguments else b"")

    def _answer_when_there(self, peer: _Peer) -> None:
        """Answer a `get` or `wait` if all its keys exist; else look again when the first that is missing does."""
        for key in peer.wanted:
            if key not in self._values:
                self._waiting.setdefault(key, set()).add(peer)
                return
        answer = self._values.get(*peer.wanted) if peer.wants_values else []
        peer.wanted = ()
        peer.answer(answer)

    def _wake(self, key: bytes) -> None:
        """Those who wait for a key that may exist by now."""
        if key not in self._values:
            return
        for peer in self._waiting.pop(key, set()):
            self._answer_when_there(peer)
            if not peer.wanted:
                self._attend(peer, selectors.EVENT_WRITE)

    def _send(self, peer: _Peer) -> None:
        more = selectors.EVENT_READ | (0 if peer.send() else selectors.EVENT_WRITE)
        if more != self._selector.get_key(peer.socket).events:
            self._selector.modify(peer.socket, more, peer)

    def _close(self, peer: _Peer, why: str = "") -> None:
        if why and self._warnings_left:
            self._warnings_left -= 1
            _LOG.warning("closed a connection from %s: %s", peer.address, why)
        self._peers.discard(peer)
        for key in peer.wanted:
            self._waiting.get(key, set()).discard(peer)
        self._unproven.pop(peer, None)
        self._selector.unregister(peer.socket)
        peer.socket.close()


class _Peer:
    """One connection of a client. It never waits."""

    def __init__(self, connection: socket.socket, address: str):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.address = address
        self.session: Session | None = None
        """None until the client has proved that it has the key."""
        self.wanted: tuple[bytes, ...] = ()
        """Keys of a `get` or `wait` that is not answered yet."""
        self.wants_values = False
        self._challenge = secrets.token_bytes(NONCE_BYTES)
        self._received = bytearray()
        self._unsent = bytearray(self._challenge)

    def receive(self) -> None:
        """Raises EOFError at the end of the connection."""
        with suppress(BlockingIOError):
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._received += data

    def prove(self, key: bytes) -> bool:
        """Whether the client has proved that it has the key, as soon as its proof is complete.
        Raises NotAuthentic if it is wrong."""
        if len(self._received) < NONCE_BYTES + TAG_BYTES:
            return False
        nonce, proof = bytes(self._received[:NONCE_BYTES]), bytes(self._received[NONCE_BYTES : NONCE_BYTES + TAG_BYTES])
        session = Session(key, self._challenge, nonce)
        if not hmac.compare_digest(proof, session.client_proof):
            raise NotAuthentic("it does not belong to the workers")
        del self._received[: NONCE_BYTES + TAG_BYTES]
        self._unsent += session.server_proof
        self.session = session
        return True

    def requests(self) -> Iterator[list[bytes]]:
        """Those that are complete."""
        while self.session is not None and (payload := self.session.requests.unpack(self._received)) is not None:
            yield unpack(payload)

    def answer(self, parts: list[bytes]) -> None:
        assert self.session is not None
        self._unsent += self.session.answers.pack(pack(parts))

    def send(self) -> bool:
        """Whether all is sent."""
        with suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]
        return not self._unsent
