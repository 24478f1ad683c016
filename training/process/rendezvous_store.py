"""A worker's end of the store through which the workers of a process group find each other
(training/process/rendezvous_server.py)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from training.process.authenticated_channel import Connection


class RendezvousStore(dist.Store):
    """A store for `init_process_group`. Whoever hands it to torch must keep it: torch holds only its C++ half.

    Raises torch's own errors: DistStoreError for a wait that takes too long, DistNetworkError for a server that cannot
    be reached, is gone, or does not have the key. Threads may share it; one operation runs at a time.
    """

    timeout: timedelta
    """torch's own; see `set_timeout`."""

    def __init__(self, host: str, port: int, key: bytes, timeout: timedelta):
        super().__init__()
        self.set_timeout(timeout)
        self._address = (host, port)
        self._key = key
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self.check([])  # a server that cannot be used shows at once

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(b"set", key.encode(), _bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._wait(b"get", keys, self.timeout)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def append(self, key: str, value: str | bytes) -> None:
        self._ask(b"append", key.encode(), _bytes(value))

    def add(self, key: str, value: int) -> int:
        return int(self._ask(b"add", key.encode(), b"%d" % value)[0])

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return self._ask(b"compare_set", key.encode(), _bytes(expected_value), _bytes(desired_value))[0]

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(b"check", *(key.encode() for key in keys)) == [b"1"]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait(b"wait", keys, self.timeout if timeout is None else timeout)

    def delete_key(self, key: str) -> bool:
        return self._ask(b"delete_key", key.encode()) == [b"1"]

    def num_keys(self) -> int:
        return int(self._ask(b"num_keys")[0])

    def clone(self) -> RendezvousStore:
        return self

    def has_extended_api(self) -> bool:
        return True

    deleteKey, getNumKeys = delete_key, num_keys  # what torch's C++ calls them

    def _wait(self, name: bytes, keys: Sequence[str], timeout: timedelta) -> list[bytes]:
        try:
            return self._exchange((name, *(key.encode() for key in keys)), timeout)
        except TimeoutError:
            milliseconds = timeout // timedelta(milliseconds=1)
            raise dist.DistStoreError(f"wait timeout after {milliseconds} ms, keys: {', '.join(keys)}") from None

    def _ask(self, *request: bytes) -> list[bytes]:
        try:
            return self._exchange(request, self.timeout)
        except TimeoutError as error:
            raise self._lost(error) from None

    def _exchange(self, request: Sequence[bytes], timeout: timedelta) -> list[bytes]:
        """After an error the next operation has a new connection. Raises TimeoutError, DistNetworkError."""
        timeout_s = timeout.total_seconds() or None  # torch: 0 is no limit
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = Connection(*self._address, self._key, timeout_s)
                return self._connection.ask(request, timeout_s)
            except OSError as error:
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
                if isinstance(error, TimeoutError):
                    raise
                raise self._lost(error) from None

    def _lost(self, error: OSError) -> Exception:
        host, port = self._address
        return dist.DistNetworkError(f"the workers' store on worker 0 ({host}:{port}) cannot be used: {error}")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
