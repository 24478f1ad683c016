"""Watches the workers of a group during a call, to detect lost machines and hangs.

One sign alone is not enough. A machine is lost if its worker's actor does not answer and the machine cannot be reached
or Ray reports it dead. A call hangs if it takes longer than `hang_after` and no worker made progress for as long.
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
"""If an actor does not answer for this time, its machine is checked."""
_REACH_S = 2.0
_COUNTED = ("train", "evaluate", "answer", "restore", "roll_out", "computed", "improve")
"""Calls in which workers report progress frequently."""
_STACKS_S = 10.0
_FULL = 0.95
"""Fraction of a machine's memory in use that is worth a warning."""


class Watch:
    """Keeps the latest health report of every worker."""

    def __init__(self, group: WorkerGroup, warn: Callable[[str], None]):
        self.group = group
        self.warn = warn
        self.every_s = max(1.0, group.size / 80)
        """Seconds between two looks; a look is one short call per worker."""
        self.health: dict[int, WorkerHealth] = {}
        self._asked: dict[int, ray.ObjectRef[Any]] = {}
        self._answered: dict[int, float] = {}
        self._last = 0.0
        self._nodes: list[dict[str, Any]] = []
        self.lost: set[int] = set()
        """Workers whose actors are gone."""
        self._warned: set[str] = set()
        self.leaving: str | None = None
        """Describes a machine that will be preempted or a part of Ray that ended; None if there is none."""
        self.leaving_node: str | None = None
        """Id of the machine that will be preempted."""

    def arrived(self) -> None:
        """Record the addresses of all machines while Ray can tell them. Call it when all actors have answered once."""
        known = placement.by_id()
        self._nodes = [known.get(place["node"], {}) for place in self.group.places]
        self._answered = dict.fromkeys(range(self.group.size), time.monotonic())

    def look(self, method: str = "", since_s: float = 0.0) -> None:
        """Check all workers; `method`, if given, has been running for `since_s`. Raises WorkerError for a lost or hung
        worker, RayLost if Ray itself is lost."""
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
                message = f"and its machine have not been reachable for {now - when:.0f} s"
                raise self._error(rank, Kind.MACHINE, message)
        hang_after = self.group.resources.hang_after
        if since_s > hang_after and (stuck := self._stuck(method, hang_after)) is not None:
            raise self._hang(stuck, method)

    def _look_at_ray(self) -> None:
        """Without the GCS, running workers still answer: there is time to save, and to continue on another Ray."""
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
                why = notice or "Ray drains it"
                self.leaving = f"{node['NodeManagerAddress']} is being preempted ({why})"
                self.leaving_node = node["NodeID"]

    def _look_for_full_memory(self) -> None:
        for rank, health in self.health.items():
            if health.memory > _FULL and (node := self.group.node_of(rank)) not in self._warned:
                self._warned.add(node)
                self.warn(f"{health.memory:.0%} of the memory of {node} is in use; the kernel may kill a worker there")

    def _can_reach(self, rank: int) -> bool:
        """Return whether the machine of a worker answers and Ray does not report it dead."""
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
        """Return the worker that the others wait for, if no worker has made progress for too long."""
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
            what = f"has been stopped (state {health.state}) for {health.pulse.beat_s:.0f} s"
        else:
            what = f"has made no progress at step {health.pulse.step} for {health.pulse.progress_s:.0f} s"
        path = self._save_stacks()
        return self._error(rank, Kind.HANG, f"{what}, in `{method}`; stack traces of all workers: {path}")

    def _save_stacks(self) -> str:
        """Write the stack traces of all workers to one file in the log folder."""
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
        """Return the error of a call that some workers have not answered in time."""
        who = ", ".join(map(str, ranks))
        message = (
            f"has not answered `{method}` within {timeout_s:.0f} s (workers {who}); stack traces of all workers: "
            f"{self._save_stacks()}"
        )
        return self._error(ranks[0], Kind.HANG, message)

    def died(self, rank: int, error: RayActorError) -> WorkerError:
        """Return the error of a worker whose actor has died."""
        self.lost.add(rank)
        if not self._nodes:
            return self._error(rank, Kind.KILLED, f"was killed before it started: {_first_line(error)}")
        if getattr(error, "preempted", False):
            return self._error(rank, Kind.PREEMPTED, "was lost with its machine, which was being drained")
        if not self._can_reach(rank):
            return self._error(rank, Kind.MACHINE, "was lost with its machine")
        return self._error(rank, Kind.KILLED, "was killed together with its supervisor process")

    def unreachable(self) -> WorkerError | None:
        """Return the error of the first worker whose machine cannot be reached, None if all can."""
        for rank in range(len(self._nodes)):
            if not self._can_reach(rank):
                self.lost.add(rank)
                return self._error(rank, Kind.MACHINE, "was lost with its machine")
        return None

    def _error(self, rank: int, kind: Kind, message: str) -> WorkerError:
        return WorkerError(rank, kind, message, self.group.log_of(rank), node=self.group.node_of(rank))

    def steps(self) -> Mapping[int, int]:
        """Return the last known step of each worker."""
        return {rank: health.pulse.step for rank, health in self.health.items() if health.pulse is not None}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
