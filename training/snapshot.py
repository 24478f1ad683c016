"""A worker's shard, written beside the training: copied to host memory at once, then to the storage by a thread.

Training waits for the copy alone. The memory of the copy is taken before the training begins, so that a machine that has too
little of it shows at the start, and is kept from one save to the next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import File, write_shard
from training.errors import SaveError
from training.storage import Place

_LOWEST_PRIORITY = 19


class ShardWriter:
    """Writes one shard at a time. `pinned`: for copies from a GPU, in memory that it can write to directly."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._buffer = torch.empty(0)
        self._path: Place | None = None
        self._thread: threading.Thread | None = None
        self._file: File | None = None
        self._error: Exception | None = None

    def reserve(self, count: int) -> None:
        """Begin to take the memory for `count` fp32 numbers."""
        self._start(self._take, count)

    def _take(self, count: int) -> None:
        self._buffer = torch.empty(count, pin_memory=self._pinned).fill_(0)  # untouched memory is only a promise

    def begin(self, path: Place, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named 1-D fp32 tensors and begin to write them to `path`. Waits for the shard before, if there is one."""
        self.finish()
        named = list(tensors)
        total = sum(tensor.numel() for _, tensor in named)
        if self._buffer.numel() < total:
            self._take(total)
        offset = 0
        for _, tensor in named:
            self._buffer.narrow(0, offset, tensor.numel()).copy_(tensor.detach())
            offset += tensor.numel()
        self._path = path
        self._start(self._write, path, [(name, tensor.numel()) for name, tensor in named])

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._file, self._error = None, None
        self._thread = threading.Thread(target=self._guarded, args=(work, *args), name="shard-writer")
        self._thread.start()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        # The training needs the processor more. On Linux this is the priority of the thread alone.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            work(*args)
        except Exception as error:  # it belongs to the thread that asks for the result
            self._error = error

    def _write(self, path: Place, layout: Sequence[tuple[str, int]]) -> None:
        total = sum(count for _, count in layout)
        self._file = write_shard(path, layout, self._buffer.narrow(0, 0, total).numpy())

    @property
    def busy(self) -> bool:
        """Whether a shard is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> File | None:
        """Wait for the shard; what was written, None if nothing was begun. Raises SaveError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            reason = getattr(error, "strerror", None) or error
            raise SaveError(f"the checkpoint cannot be written: {reason}: {self._path or 'memory for the copy'}")
        return self._file
