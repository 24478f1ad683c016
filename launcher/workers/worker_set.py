"""The workers of one phase over all its attempts: groups on Ray, or one worker in this process.

After a failure only the processes are ended. Their actors, with everything imported, start the next attempt, unless an
actor is gone or its machine must be avoided: then new machines are requested.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launcher.workers import ray_session
from training.config import Phase
from training.device import DeviceType, device_type, is_available
from training.group import Group
from training.recipes import RECIPES

if TYPE_CHECKING:
    from launcher.workers.worker_group import WorkerGroup

_GROW_S = 30.0
"""How long to wait for machines that were free."""
_FOLLOWED = 8
"""With more workers than this, only the output of the first one is shown; every worker has a log file."""


class WorkerSet(Protocol):
    """The workers of a phase."""

    @property
    def why_moved(self) -> str | None:
        """Why the last attempt moved to other machines, None if it did not."""
        ...

    def attempt(self, logs: Path) -> Any:
        """Return a context manager of the groups by role, with the roles built.
        Their output goes to files in `logs`."""
        ...

    def members(self) -> list[dict[str, Any]]:
        """Return rank, machine address and process id of every worker."""
        ...

    def check(self, storage: str, room: int) -> dict[str, Any] | None:
        """Run the preflight checks on new machines. `room`: bytes that checkpoints need. Returns figures, None if there
        are no new machines. Raises what launcher/workers/preflight.py raises."""
        ...

    def price(self) -> float | None:
        """Return the price of the machines per hour; None if it is unknown."""
        ...

    def avoid(self, nodes: frozenset[str]) -> None:
        """Exclude these machines from now on."""
        ...

    def step_in_hand(self) -> int:
        """Return the latest known step of a worker, 0 if there is none."""
        ...

    def saved(self) -> None:
        """Note that a checkpoint was committed: a good moment to move to other machines."""
        ...

    def reason_to_move(self) -> str | None:
        """Return why the phase should be saved and moved to other machines, None if it should not."""
        ...


@contextmanager
def worker_set_of(
    phase: Phase, name: str, cache: Path, say: Callable[[str], None], warn: Callable[[str], None], *, inline: bool
) -> Iterator[WorkerSet]:
    """Create the workers of a phase. `say` receives lines to show, `warn` warnings, which are also recorded."""
    if inline:
        yield _InlineWorkerSet(phase, cache)
        return
    _warn_of_few_cores(phase, say)
    targets = RECIPES[phase.recipe].roles
    placements = [
        GroupWorkers(seated, {role: targets[role] for role in roles or targets}, name, cache, say, warn)
        for roles, seated in phase.placements
    ]
    try:
        yield _RayWorkerSet(placements)
    finally:
        for team in placements:
            team.close()


class _RayWorkerSet:
    """One or several groups of workers on Ray. They start, fail, move and end together."""

    def __init__(self, placements: Sequence[GroupWorkers]):
        self.placements = placements

    @property
    def why_moved(self) -> str | None:
        return next((team.why_moved for team in self.placements if team.why_moved), None)

    @contextmanager
    def attempt(self, logs: Path) -> Iterator[dict[str, Group]]:
        if ray_session.lost() is not None:
            for team in self.placements:
                team.close()
            ray_session.restart()
        groups: dict[str, Group] = {}
        with ExitStack() as stack:
            for team in self.placements:
                own_logs = logs if len(self.placements) == 1 else logs / "-".join(team.roles)
                groups |= stack.enter_context(team.attempt(own_logs))
            with self._together():
                yield groups

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Make the groups know each other within the block: a call to one group watches all of them."""
        together = [team.workers for team in self.placements if team.workers is not None]
        for workers in together:
            workers.others = [other for other in together if other is not workers]
        try:
            yield
        finally:
            for workers in together:  # those that stay must not look at those that are given up
                workers.others = []

    def members(self) -> list[dict[str, Any]]:
        members = [member for team in self.placements for member in team.members()]
        return [{**member, "rank": rank} for rank, member in enumerate(members)]

    def check(self, storage: str, room: int) -> dict[str, Any] | None:
        found = [figures for team in self.placements if (figures := team.check(storage, room)) is not None]
        return {"groups": found} if len(found) > 1 else next(iter(found), None)

    def price(self) -> float | None:
        from launcher.workers import placement

        return placement.price({place["node"] for team in self.placements for place in team.places()})

    def avoid(self, nodes: frozenset[str]) -> None:
        for team in self.placements:
            team.avoid(nodes)

    def step_in_hand(self) -> int:
        return max(team.step_in_hand() for team in self.placements)

    def saved(self) -> None:
        for team in self.placements:
            team.saved()

    def reason_to_move(self) -> str | None:
        return next(filter(None, (team.reason_to_move() for team in self.placements)), None)


class GroupWorkers:
    """One group of workers over all attempts, with the roles that it runs."""

    def __init__(
        self, phase: Phase, roles: Mapping[str, str], name: str, cache: Path, say: Callable[[str], None],
        warn: Callable[[str], None]
    ):  # fmt: skip
        self.phase, self.roles, self.name, self.cache, self.say, self.warn = phase, roles, name, cache, say, warn
        self.workers: WorkerGroup | None = None
        self._avoided: frozenset[str] = frozenset()
        self._leaving: frozenset[str] = frozenset()
        """Ids of machines that will be preempted."""
        self._checked: frozenset[str] = frozenset()
        """Ids of machines that passed the preflight checks."""
        self._grow, self._size, self._no_growth_before = False, 0, 0.0
        self.why_moved: str | None = None

    @contextmanager
    def attempt(self, logs: Path) -> Iterator[dict[str, Group]]:
        from launcher.workers.worker_group import WorkerGroup

        if self.workers is None:
            wait_s = _GROW_S if self._grow else None
            self.workers = WorkerGroup(
                self.phase.resources, self.say, self.warn, avoid=self._avoided, never=self._leaving, wait_s=wait_s
            )
            if self._grow and self.workers.size <= self._size:  # free, but not in the right places
                self._no_growth_before = time.monotonic() + self.phase.resources.wait_for_machines
        workers = self.workers
        self._grow, self._size = False, workers.size
        try:
            workers.begin(logs)
            with _following(workers, f"{self.name}/{next(iter(self.roles))}", self.say):
                yield {
                    role: workers.build(role, target, self.phase, str(self.cache))
                    for role, target in self.roles.items()
                }
        finally:
            self.why_moved = self.reason_to_move()
            if (node := workers.watch.leaving_node) is not None:
                self._leaving |= {node}
            if self.why_moved is not None or not workers.end():
                self.close()

    def check(self, storage: str, room: int) -> dict[str, Any] | None:
        from launcher.workers import preflight

        here = frozenset(place["node"] for place in self.places())
        if here <= self._checked:
            return None
        assert self.workers is not None
        figures = preflight.check(self.workers, storage, room, self.warn)
        self._checked |= here
        return figures

    def places(self) -> Sequence[Mapping[str, Any]]:
        assert self.workers is not None
        return self.workers.places

    def members(self) -> list[dict[str, Any]]:
        assert self.workers is not None
        places = zip(self.workers.places, self.workers.pids, strict=True)
        return [{"rank": rank, "machine": place["address"], "pid": pid} for rank, (place, pid) in enumerate(places)]

    def avoid(self, nodes: frozenset[str]) -> None:
        self._avoided = nodes
        if self.workers is not None and self.workers.can_avoid(nodes):
            self.close()

    def step_in_hand(self) -> int:
        return max(self.workers.watch.steps().values(), default=0) if self.workers is not None else 0

    def saved(self) -> None:
        if self.workers is not None and time.monotonic() >= self._no_growth_before:
            self._grow = self.workers.could_grow()

    def reason_to_move(self) -> str | None:
        if self.workers is None:
            return None
        leaving = self.workers.watch.leaving
        return leaving or ("machines for more workers are available" if self._grow else None)

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()
            self.workers = None


def _warn_of_few_cores(phase: Phase, say: Callable[[str], None]) -> None:
    cores = os.cpu_count() or 1
    if "RAY_ADDRESS" not in os.environ and phase.num_workers > cores and phase.resources.gpus_per_worker != 1:
        say(f"{phase.num_workers} workers share {cores} CPU cores, so they run one after another")


class _InlineWorkerSet:
    """One worker in this process, without supervision and retries."""

    why_moved: str | None = None

    def __init__(self, phase: Phase, cache: Path):
        self.phase, self.cache = phase, cache

    @contextmanager
    def attempt(self, logs: Path) -> Iterator[dict[str, Group]]:
        yield _inline_groups(self.phase, RECIPES[self.phase.recipe].roles, (self.phase, str(self.cache)))

    def members(self) -> list[dict[str, Any]]:
        return [{"rank": 0, "machine": "127.0.0.1", "pid": os.getpid()}]

    def check(self, storage: str, room: int) -> dict[str, Any] | None:
        return None

    def price(self) -> float | None:
        return None

    def avoid(self, nodes: frozenset[str]) -> None:
        """Do nothing, since there is only one machine."""

    def step_in_hand(self) -> int:
        return 0

    def saved(self) -> None:
        """Do nothing, since there is only one machine."""

    def reason_to_move(self) -> str | None:
        return None


def _inline_groups(phase: Phase, roles: Mapping[str, str], arguments: tuple[Any, ...]) -> dict[str, Group]:
    """Create the roles in this process. Its process group of one worker is created once and kept, since DeepSpeed
    never forgets groups."""
    import torch.distributed as dist

    from training.group import InlineGroup, Worker
    from training.process.distributed import RankInfo, join, leave, set_environment

    threads = phase.resources.threads if phase.resources.threads != "auto" else os.cpu_count() or 1
    rank_info = RankInfo(rank=0, size=1, threads=threads, device=_inline_device(phase))
    if not dist.is_initialized():
        set_environment(rank_info)
        join(rank_info)
        atexit.register(leave)
    worker = Worker(rank_info)
    for role, target in roles.items():
        worker.build(role, target, *arguments)
    return {role: InlineGroup(worker, role) for role in roles}


def _inline_device(phase: Phase) -> DeviceType:
    return device_type(phase.resources.gpus_per_worker != 0 and is_available())


@contextmanager
def _following(workers: WorkerGroup, label: str, say: Callable[[str], None]) -> Iterator[None]:
    """Show the output of workers, with their names, within the block."""
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
