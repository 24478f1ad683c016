"""Objects over a Unix socket between a worker's process and the actor beside it. Large arrays lie in shared memory:
written once, read where they lie.

A pipe of the standard library copies an array six times on its way: weights for a rollout group would take a minute
where this takes seconds.
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
"""Of an array that goes through shared memory."""
_HEAD = struct.Struct("!QQ")
"""Bytes of the pickle, number of arrays outside of it."""


class Pipe:
    """One end of a stream socket. Only for ends that trust each other: what is sent is pickled."""

    def __init__(self, end: socket.socket):
        self.end = end

    def fileno(self) -> int:
        return self.end.fileno()

    def poll(self) -> bool:
        """Whether there is something to receive, or the other end is gone."""
        return bool(wait([self.end], 0))

    def send(self, value: Any) -> None:
        """Raises what pickle raises for a value that cannot be sent; nothing is sent then."""
        outside: list[memoryview] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            """Whether a part of the value is pickled with the rest."""
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
    """Memory without a name that holds some buffers one behind the other, by its descriptor.
    It lives for as long as somebody reads."""

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
    """The buffers of shared memory that the other end has written."""
    memory = memoryview(mmap.mmap(descriptor, sum(sizes), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    os.close(descriptor)
    out = []
    for size in sizes:
        out.append(memory[:size])
        memory = memory[size:]
    return out
