"""A worker's shard, written beside the training: copied to host memory at once, then to the file by a thread.

Training waits for the copy alone. The memory of the copy is kept for the next one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import File, write_shard
from training.errors import SaveError

_LOWEST_PRIORITY = 19


class ShardWriter:
    """Writes one shard at a time."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._path: Path | None = None
        self._thread: threading.Thread | None = None
        self._file: File | None = None
        self._error: Exception | None = None

    def begin(self, path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named 1-D fp32 tensors and begin to write them to `path`. Waits for the shard before, if there is one."""
        self.finish()
        named = list(tensors)
        total = sum(tensor.numel() for _, tensor in named)
        if self._buffer.numel() != total:
            self._buffer = torch.empty(total)
        arrays, offset = [], 0
        for name, tensor in named:
            copy = self._buffer.narrow(0, offset, tensor.numel())
            copy.copy_(tensor.detach())
            arrays.append((name, copy.numpy()))
            offset += tensor.numel()
        self._path, self._file, self._error = path, None, None
        self._thread = threading.Thread(target=self._write, args=(path, arrays), name="shard-writer")
        self._thread.start()

    def _write(self, path: Path, arrays: list[tuple[str, np.ndarray]]) -> None:
        # The training needs the processor more. On Linux this is the priority of the thread alone.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            self._file = write_shard(path, arrays)
        except Exception as error:  # it belongs to the thread that asks for the result
            self._error = error

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
            raise SaveError(f"the checkpoint cannot be written: {reason}: {self._path}")
        return self._file
