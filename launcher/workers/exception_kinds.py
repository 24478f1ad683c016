"""Classifies exceptions in a worker by their type and the code that raised them.

The text of a message decides nothing, since any code may print "NCCL" or "Connection refused". Two errors of torch
have no type of their own; they are recognized by the location in torch's C++ code that they name.
"""

from __future__ import annotations

import re
import sys
import traceback

from launcher.workers.errors import Kind, Raised
from training.errors import MusterError

_PROCESS_GROUP = ("torch.distributed", "deepspeed.comm", "training.process.distributed")
"""Modules through which workers reach each other."""
_GLOO_TRANSPORT = re.compile(r"\[\S*/gloo/transport/\S+\.cc:\d+\]")
_CPU_ALLOCATOR = re.compile(r"\[enforce fail at \S*alloc_cpu\.cpp:\d+\]")


def evidence_of(error: Exception, trace: str) -> MusterError:
    """Return the error itself if its message is for the user, else the evidence about it."""
    if isinstance(error, MusterError):
        return error
    return Raised(type(error).__name__, str(error), trace, kind_of(error))


def kind_of(error: Exception) -> Kind:
    if isinstance(error, MemoryError | _torch_type("torch", "OutOfMemoryError")) or _is_of_torch(error, _CPU_ALLOCATOR):
        return Kind.MEMORY
    if isinstance(error, _torch_type("torch.distributed", "DistError")) or _is_of_torch(error, _GLOO_TRANSPORT):
        return Kind.CONNECTION
    if isinstance(error, OSError) and _came_through_process_group(error):
        return Kind.CONNECTION
    return Kind.PROGRAM


def _torch_type(module: str, name: str) -> type[Exception]:
    """Return the type without loading torch: if torch is not loaded, nothing can have raised it."""
    return getattr(sys.modules.get(module), name, _Never)


class _Never(Exception):
    """Is never raised."""


def _is_of_torch(error: Exception, place: re.Pattern[str]) -> bool:
    return type(error) is RuntimeError and place.search(str(error)) is not None


def _came_through_process_group(error: Exception) -> bool:
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f"{module}.".startswith(f"{group}.") for module in modules for group in _PROCESS_GROUP)
