"""The heartbeat of a worker, in memory that its observer can read while the worker is busy, stopped or dead.

A thread beats twice a second, whatever the training does; the training counts its micro-batches. A worker whose count
stands still and whose heart beats waits for something; one whose heart does not beat is stopped.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from dataclasses import dataclass

SIZE = mmap.PAGESIZE
_BEAT = struct.Struct("<d")
_PROGRESS = struct.Struct("<dqq")
_PROGRESS_AT = 64
"""Byte offset: the two writers do not share a cache line."""
_EVERY_S = 0.5


@dataclass(frozen=True)
class Pulse:
    """What a worker's memory says at a moment. Times are seconds before that moment."""

    beat_s: float
    """Since the heart last beat."""
    progress_s: float
    """Since anything was last done."""
    count: int
    """Things done since the worker began: micro-batches, blocks read."""
    step: int
    """The step in hand, 0 before the first."""


def read(memory: mmap.mmap) -> Pulse:
    """The pulse of a worker on the same machine: the clock is the machine's."""
    now = time.monotonic()
    (beat,) = _BEAT.unpack_from(memory)
    progress, count, step = _PROGRESS.unpack_from(memory, _PROGRESS_AT)
    return Pulse(now - beat, now - progress, count, step)


class _Heart:
    """This process's own."""

    def __init__(self, memory: mmap.mmap):
        self.memory = memory
        self.count = self.step = 0

    def progressed(self) -> None:
        self.count += 1
        _PROGRESS.pack_into(self.memory, _PROGRESS_AT, time.monotonic(), self.count, self.step)

    def beat(self) -> None:
        while True:
            _BEAT.pack_into(self.memory, 0, time.monotonic())
            time.sleep(_EVERY_S)


_heart: _Heart | None = None


def begin(memory: mmap.mmap) -> None:
    """Let this process's heart beat in `memory`, SIZE bytes shared with the one who watches."""
    global _heart
    _heart = _Heart(memory)
    _heart.progressed()
    threading.Thread(target=_heart.beat, name="heart", daemon=True).start()


def progressed(step: int | None = None) -> None:
    """Something was done; `step`: the step in hand from now on. Nothing happens in a process that nobody watches."""
    if _heart is not None:
        _heart.step = _heart.step if step is None else step
        _heart.progressed()
