"""Looks at the workers of a group while a call waits for them: machines that fall silent, and calls that get nowhere.

Nobody is given up on one sign alone. A machine is lost when its worker's place does not answer and the machine cannot
be reached or Ray has given it up; a hang is a call that outlasts `hang_after` in which no worker has done anything for
as long.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from launcher.workers import placement, ray_session
from launcher.workers.errors import Kind, RayLost, WorkerError
from launcher.workers.supervisor import WorkerHealth

if TYPE_CHECKING:
    from launcher.workers.worker_group import WorkerGroup

_SILENCE_S = 6.0
"""A place that does not answer for so long is asked after."""
_REACH_S = 2.0
_COUNTED = ("train", "evaluate", "answer", "restore", "roll_out", "computed", "improve")
"""Calls in which workers tell of every small thing that they have done."""
_STACKS_S = 10.0
_FULL = 0.95
"""Fraction of a machine's memory in use that is worth a warning."""


class Watch:
    """Keeps the latest signs of every worker."""

    def __init__(self, group: WorkerGroup, warn: Callable[[str], None]):
        self.group = group
        self.warn = warn
        self.every_s = max(1.0, group.size / 80)
        """Seconds between two looks; a look is one short call a worker."""
        self.health: dict[int, WorkerHealth] = {}
        self._asked: dict[int, ray.ObjectRef[Any]] = {}
        self._answered: dict[int, float] = {}
        self._last = 0.0
        self._nodes: list[dict[str, Any]] = []
        self.lost: set[int] = set()
        """Workers that are gone with their places."""
        self._warned: set[str] = set()
        self.leaving: str | None = None
        """Which machine is about to be taken back, or what of Ray has ended, if there is such a thing: in words."""
        self.leaving_node: str | None = None
        """Id of the machine."""

    def arrived(self) -> None:
        """All places have answered for the first time. Remembers how to reach their machines while Ray can tell."""
        known = placement.by_id()
        self._nodes = [known.get(place["node"], {}) for place in self.group.places]
        self._answered = dict.fromkeys(range(self.group.size), time.monotonic())

    def look(self, method: str = "", since_s: float = 0.0) -> None:
        """A glance at all workers, while `method`, if one is, is under way since `since_s`. Raises WorkerError for what
        is lost or hangs, RayLost if that is Ray itself."""
        self._look_at_ray()
        now = time.monotonic()
        if not self._nodes or now - self._last < self.every_s:
            return
        self._last = now
        self._hear()
        self._ask()
        self._look_for_leaving()
        self._look_for_full_memory()
        for rank, when in self._answered.items():
            if now - when > _SILENCE_S and not self._can_reach(rank):
                self.lost.add(rank)
                message = f"cannot be reached for {now - when:.0f} s, nor can its machine"
                raise self._error(rank, Kind.MACHINE, message)
        hang_after = self.group.resources.hang_after
        if since_s > hang_after and (stuck := self._stuck(method, hang_after)) is not None:
            raise self._hang(stuck, method)

    def _look_at_ray(self) -> None:
        """Without its GCS, workers that have begun answer on: there is time to save, and to go on with another Ray."""
        if (found := ray_session.lost()) is None:
            return
        if not (found.workers_answer and self._nodes):
            self.lost.update(range(self.group.size))
            raise RayLost(found.words)
        self.leaving = self.leaving or found.words

    def _hear(self) -> None:
        asked = {ref: rank for rank, ref in self._asked.items()}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for ref in ready:
            rank = asked[ref]
            del self._asked[rank]
            with suppress(RayError):  # the call that is waited for has the error too
                self.health[rank] = ray.get(ref)
                self._answered[rank] = time.monotonic()

    def _ask(self) -> None:
        for rank, actor in enumerate(self.group.actors):
            if rank not in self._asked:
                self._asked[rank] = actor.health.remote()

    def _look_for_leaving(self) -> None:
        if self.leaving is not None:
            return
        draining = {} if ray_session.is_own() else placement.draining()
        for rank, node in enumerate(self._nodes):
            notice = self.health[rank].notice if rank in self.health else None
            if notice is not None or node["NodeID"] in draining:
                why = notice or "it is being drained"
                self.leaving = f"{node['NodeManagerAddress']} is about to be taken back ({why})"
                self.leaving_node = node["NodeID"]

    def _look_for_full_memory(self) -> None:
        for rank, health in self.health.items():
            if health.memory > _FULL and (node := self.group.node_of(rank)) not in self._warned:
                self._warned.add(node)
                self.warn(f"{health.memory:.0%} of the memory of {node} is in use; a worker there may be killed for it")

    def _can_reach(self, rank: int) -> bool:
        """Whether the machine of a worker answers, and Ray has not given it up."""
        node = self._nodes[rank]
        with suppress(RayError):
            if ray_session.lost() is None and not placement.node(node["NodeID"]).get("Alive", True):
                return False
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_REACH_S).close()
        except OSError:
            return False
        return True

    def _stuck(self, method: str, hang_after: float) -> int | None:
        """The worker that all wait for, if nothing has moved for too long."""
        alive = {rank: health.pulse for rank, health in self.health.items() if health.pulse is not None}
        stopped = [rank for rank, pulse in alive.items() if pulse.beat_s > hang_after]
        if stopped:
            return stopped[0]
        if method in _COUNTED and alive and all(pulse.progress_s > hang_after for pulse in alive.values()):
            return min(alive, key=lambda rank: (alive[rank].step, alive[rank].count, rank))
        return None

    def _hang(self, rank: int, method: str) -> WorkerError:
        health = self.health[rank]
        assert health.pulse is not None
        if health.pulse.beat_s > self.group.resources.hang_after:
            what = f"is stopped (state {health.state}) since {health.pulse.beat_s:.0f} s"
        else:
            what = f"does not get on with step {health.pulse.step} since {health.pulse.progress_s:.0f} s"
        path = self._save_stacks()
        return self._error(rank, Kind.HANG, f"{what}, in `{method}`; the stacks of all workers: {path}")

    def _save_stacks(self) -> str:
        """What every worker is doing, in one file beside the logs."""
        refs = [actor.stacks.remote() for actor in self.group.actors]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_STACKS_S)
        path = self.group.logs / "stacks.txt"
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            for rank, ref in enumerate(refs):
                text = ""
                with suppress(RayError, GetTimeoutError):
                    text = ray.get(ref) if ref in ready else ""
                file.write(f"== worker {rank} on {self.group.node_of(rank)}\n{text or 'does not answer'}\n")
        return str(path)

    def overdue(self, method: str, timeout_s: float, ranks: Sequence[int]) -> WorkerError:
        """A call that some workers have not answered in time."""
        who = ", ".join(map(str, ranks))
        message = (
            f"has not answered `{method}` within {timeout_s:.0f} s (workers {who}); the stacks of all workers: "
            f"{self._save_stacks()}"
        )
        return self._error(ranks[0], Kind.HANG, message)

    def died(self, rank: int, error: RayActorError) -> WorkerError:
        """What became of a worker whose place has died."""
        self.lost.add(rank)
        if not self._nodes:
            return self._error(rank, Kind.KILLED, f"was killed before it began: {_first_line(error)}")
        if getattr(error, "preempted", False):
            return self._error(rank, Kind.PREEMPTED, "is gone with its machine, which was being drained")
        if not self._can_reach(rank):
            return self._error(rank, Kind.MACHINE, "is gone with its machine")
        return self._error(rank, Kind.KILLED, "was killed together with the process that watched over it")

    def unreachable(self) -> WorkerError | None:
        """What became of the first worker whose machine cannot be reached."""
        for rank in range(len(self._nodes)):
            if not self._can_reach(rank):
                self.lost.add(rank)
                return self._error(rank, Kind.MACHINE, "is gone with its machine")
        return None

    def _error(self, rank: int, kind: Kind, message: str) -> WorkerError:
        return WorkerError(rank, kind, message, self.group.log_of(rank), node=self.group.node_of(rank))

    def steps(self) -> Mapping[int, int]:
        """The step that each worker was last seen at."""
        return {rank: health.pulse.step for rank, health in self.health.items() if health.pulse is not None}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
