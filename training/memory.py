"""Memory of this process: what it holds at most, and giving back what is freed."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL, _LARGE = 256 << 10, 32 << 20
"""glibc's own limits: it starts near the first and raises it, up to the second, as large blocks are freed."""


def peak_bytes() -> int:
    """The most memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within the block a freed tensor goes back to the system at once, instead of leaving a hole in the heap.

    Loading a sharded model gathers and frees every layer in turn; the holes would add up to more than the whole model.
    Not for training, where the same blocks are needed again in the next step. Without glibc it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    mallopt(_M_TRIM_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
        malloc_trim(0)
