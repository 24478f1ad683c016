"""A worker's shards, written beside the training: copied to host memory at once, then to the storage by a thread.

Training waits for the copy alone. The memory of the copy is taken before the training begins, so that a machine that
has too little of it shows at the start, and is kept from one save to the next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from training.checkpoint.format import File, write_shard
from training.errors import SaveError
from training.storage import StoragePath

_LOWEST_PRIORITY = 19


class ShardWriter:
    """Writes the shards of one checkpoint at a time. `pinned`: for copies from a GPU,
    in memory that it can write to directly."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._buffer = torch.empty(0)
        self._folder: StoragePath | None = None
        self._thread: threading.Thread | None = None
        self._files: list[File] = []
        self._error: Exception | None = None

    def reserve(self, count: int) -> None:
        """Begin to take the memory for `count` fp32 numbers."""
        self._start(self._take, count)

    def _take(self, count: int) -> None:
        self._buffer = torch.empty(count, pin_memory=self._pinned).fill_(0)  # untouched memory is only a promise

    def begin(self, folder: StoragePath, shards: Mapping[str, Sequence[tuple[str, Tensor]]]) -> None:
        """Copy named 1-D fp32 tensors, by the shard that they belong to, and begin to write the shards to a folder.

        Waits for those before, if there are any.
        """
        self.finish()
        total = sum(tensor.numel() for named in shards.values() for _, tensor in named)
        if self._buffer.numel() < total:
            self._take(total)
        offset = 0
        for _, tensor in chain.from_iterable(shards.values()):
            self._buffer.narrow(0, offset, tensor.numel()).copy_(tensor.detach())
            offset += tensor.numel()
        self._folder = folder
        layouts = {shard: [(name, tensor.numel()) for name, tensor in named] for shard, named in shards.items()}
        self._start(self._write, folder, layouts)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._files, self._error = [], None
        self._thread = threading.Thread(target=self._guarded, args=(work, *args), name="shard-writer")
        self._thread.start()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        # The training needs the processor more. On Linux this is the priority of the thread alone.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            work(*args)
        except Exception as error:  # it belongs to the thread that asks for the result
            self._error = error

    def _write(self, folder: StoragePath, layouts: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        offset = 0
        for shard, layout in layouts.items():
            total = sum(count for _, count in layout)
            self._files.append(write_shard(folder / shard, layout, self._buffer.narrow(0, offset, total).numpy()))
            offset += total

    @property
    def busy(self) -> bool:
        """Whether shards are being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> list[File]:
        """Wait for the shards; what was written, nothing if nothing was begun.
        Raises SaveError if they could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            reason = getattr(error, "strerror", None) or error
            raise SaveError(f"the checkpoint cannot be written: {reason}: {self._folder or 'memory for the copy'}")
        return self._files
