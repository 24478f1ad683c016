"""What kind of failure an exception of a worker is. Decided in the worker,
by the type of the exception and the code that raised it.

Words in a message decide nothing: anybody may say "NCCL" or "Connection refused". Two errors of torch have no type of
their own; they are told by the place in torch's C++ code that they name.
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
    """The error itself if it is meant for people, else what there is to know of it."""
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
    """The type, without loading torch: where it is not loaded nobody has raised it."""
    return getattr(sys.modules.get(module), name, _Never)


class _Never(Exception):
    """Nobody raises it."""


def _is_of_torch(error: Exception, place: re.Pattern[str]) -> bool:
    return type(error) is RuntimeError and place.search(str(error)) is not None


def _came_through_process_group(error: Exception) -> bool:
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f"{module}.".startswith(f"{group}.") for module in modules for group in _PROCESS_GROUP)
