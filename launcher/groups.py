"""The workers of one phase: gathered on Ray, or one in this process; shown while they work, and always given back."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import Phase
from training.group import Group
from training.recipes import RECIPES

if TYPE_CHECKING:
    from launcher.workers import WorkerGroup

_FOLLOWED = 8
"""Of more workers than this only the first one's output is shown; every log file has its own."""


@contextmanager
def groups_of(
    phase: Phase, name: str, logs: Path, cache: Path, say: Callable[[str], None], *, inline: bool
) -> Iterator[dict[str, Group]]:
    """The groups of a phase, by role, with the roles built. `say` receives lines for the terminal."""
    (role, target), *_ = RECIPES[phase.recipe].roles.items()
    arguments = (phase, str(cache))
    if inline:
        yield {role: _inline_group(phase, role, target, arguments)}
        return
    from launcher.workers import WorkerGroup

    _warn_of_few_cores(phase, say)
    workers = WorkerGroup(phase.resources, logs, say)
    try:
        with _following(workers, f"{name}/{role}", say):
            yield {role: workers.build(role, target, *arguments)}
    finally:
        workers.close()


def _warn_of_few_cores(phase: Phase, say: Callable[[str], None]) -> None:
    cores = os.cpu_count() or 1
    if "RAY_ADDRESS" not in os.environ and phase.resources.workers > cores and phase.resources.gpus_per_worker != 1:
        say(f"{phase.resources.workers} workers share {cores} cores: they take turns")


def _inline_group(phase: Phase, role: str, target: str, arguments: tuple) -> Group:
    """The role in this process. Its process group of one is made once and kept: DeepSpeed remembers groups for good."""
    import torch.distributed as dist

    from training.distributed import Seat, join, leave, set_environment
    from training.group import InlineGroup, Worker

    threads = phase.resources.threads if phase.resources.threads != "auto" else os.cpu_count() or 1
    seat = Seat(rank=0, size=1, threads=threads, device=_inline_device(phase))
    if not dist.is_initialized():
        set_environment(seat)
        join(seat)
        atexit.register(leave)
    worker = Worker(seat)
    worker.build(role, target, *arguments)
    return InlineGroup(worker, role)


def _inline_device(phase: Phase) -> Any:
    import torch

    return "cuda" if phase.resources.gpus_per_worker != 0 and torch.cuda.is_available() else "cpu"


@contextmanager
def _following(workers: WorkerGroup, label: str, say: Callable[[str], None]) -> Iterator[None]:
    """Show what workers print, with their names, while the block runs."""
    ended = threading.Event()
    followed = range(workers.size if workers.size <= _FOLLOWED else 1)
    offsets = dict.fromkeys(followed, 0)

    def show() -> None:
        for rank in followed:
            text = workers.read_log(rank, offsets[rank])
            whole = text[: text.rfind(b"\n") + 1]
            offsets[rank] += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if line.strip():
                    say(f"{label}-{rank} | {line}")

    def follow() -> None:
        while not ended.wait(1.0):
            show()

    thread = threading.Thread(target=follow, name="log-follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
        show()
