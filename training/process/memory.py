"""The memory of this process: its peak, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL, _HUGE_PAGE, _KEPT = 256 << 10, 2 << 20, 64 << 20
TUNABLES = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={_HUGE_PAGE}:glibc.malloc.trim_threshold={_KEPT}"
"""GLIBC_TUNABLES of workers on CPUs, whose every step takes hundreds of megabytes anew: in huge pages. Blocks as large
as one are mapped by themselves: rows of all lengths would leave holes of all sizes in the heap."""


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
        mallopt(_M_MMAP_THRESHOLD, _HUGE_PAGE)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        malloc_trim(0)
