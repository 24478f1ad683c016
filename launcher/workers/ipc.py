"""Sends objects over a Unix socket between a worker's process and its actor. Large arrays go through shared memory,
which is written once and read in place.

A pipe of the standard library copies an array six times: sending weights to a rollout group would take a minute instead
of seconds.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
from array import array
from multiprocessing.connection import wait
from typing import Any

_LARGE_BYTES = 1 << 20
"""Smallest size of an array that goes through shared memory."""
_HEAD = struct.Struct("!QQ")
"""Bytes of the pickle, number of arrays in shared memory."""


class Pipe:
    """One end of a stream socket. Both ends must trust each other, since values are pickled."""

    def __init__(self, end: socket.socket):
        self.end = end

    def fileno(self) -> int:
        return self.end.fileno()

    def poll(self) -> bool:
        """Return whether there is something to receive, or the other end is gone."""
        return bool(wait([self.end], 0))

    def send(self, value: Any) -> None:
        """Raises what pickle raises for a value that cannot be sent; nothing is sent then."""
        outside: list[memoryview] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            """Return whether a buffer is small enough to be part of the pickle."""
            raw = buffer.raw()
            if raw.nbytes < _LARGE_BYTES:
                return True
            outside.append(raw)
            return False

        data = pickle.dumps(value, protocol=5, buffer_callback=stays)
        head = _HEAD.pack(len(data), len(outside))
        if outside:
            with _Shared(outside) as shared:
                socket.send_fds(self.end, [head], [shared])
            self.end.sendall(array("Q", map(len, outside)).tobytes())
        else:
            self.end.sendall(head)
        self.end.sendall(data)

    def recv(self) -> Any:
        """Raises EOFError when the other end is gone."""
        head, descriptors, _, _ = socket.recv_fds(self.end, _HEAD.size, 1)
        if not head:
            raise EOFError
        num_bytes, num_outside = _HEAD.unpack(head + self._read(_HEAD.size - len(head)))
        sizes = array("Q", bytes(self._read(8 * num_outside)))
        data = self._read(num_bytes)
        return pickle.loads(data, buffers=_mapped(descriptors[0], sizes) if descriptors else ())

    def _read(self, count: int) -> bytearray:
        out = bytearray(count)
        view = memoryview(out)
        while view:
            if not (read := self.end.recv_into(view)):
                raise EOFError
            view = view[read:]
        return out


class _Shared:
    """Anonymous shared memory that holds buffers one after another. It exists until its last reader closes it."""

    def __init__(self, buffers: list[memoryview]):
        self.descriptor = os.memfd_create("muster")
        with open(self.descriptor, "wb", buffering=0, closefd=False) as file:
            for buffer in buffers:
                rest = buffer
                while rest:  # one call to the system may write a part
                    rest = rest[file.write(rest) :]

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *exc: object) -> None:
        os.close(self.descriptor)


def _mapped(descriptor: int, sizes: array[int]) -> list[memoryview]:
    """Map the buffers that the other end wrote to shared memory."""
    memory = memoryview(mmap.mmap(descriptor, sum(sizes), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    os.close(descriptor)
    out = []
    for size in sizes:
        out.append(memory[:size])
        memory = memory[size:]
    return out
