"""A group of workers on Ray: one placement group and one actor per worker, used as a Group."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.jobfile.job import ENV_NAMES
from launcher.workers import placement, ray_session
from launcher.workers.actor import WorkerActor
from launcher.workers.errors import Kind, Raised, WorkerDied, WorkerError, first_cause, worker_error
from launcher.workers.watchdog import Watch
from training.config import Resources
from training.device import DeviceType, device_type
from training.errors import MusterError
from training.group import Future
from training.process.authenticated_channel import KEY_BYTES
from training.process.distributed import RankInfo

START_S = 300.0
"""Longest time to start the processes and create the process group."""
_PASSED_ON = ("HF_", "NCCL_", "MUSTER_", "AWS_", "GOOGLE_", "FSSPEC_")
_GRACE_S = 2.0
"""How long to wait for other errors after the first one: the death of a worker is often seen after the errors that it
causes in others."""


class _Call:
    """One method called on every worker. An error of one worker is an error of the whole call."""

    def __init__(self, refs: Sequence[ray.ObjectRef[Any]], group: WorkerGroup, method: str):
        self.refs = list(refs)
        self.group = group
        self.method = method
        self.began = time.monotonic()
        self.waiting = list(refs)
        self.answers: dict[ray.ObjectRef[Any], Any] = {}

    def wait(self, ref: ray.ObjectRef[Any], timeout_s: float | None) -> Any:
        """Return the result of one worker, within `timeout_s` of the call.
        Raises the first cause as soon as any worker fails."""
        while ref not in self.answers:
            left = None if timeout_s is None else max(0.0, self.began + timeout_s - time.monotonic())
            patience = self.group.watch.every_s if left is None else min(self.group.watch.every_s, left)
            ready, _ = ray.wait(self.waiting, num_returns=1, timeout=patience)
            if ready:
                self._take()
            elif left is not None and left <= patience:
                late = [self.refs.index(late) for late in self.waiting]
                raise self.group.watch.overdue(self.method, timeout_s or 0, late)
            self.group.watch.look(self.method, time.monotonic() - self.began)
            for other in self.group.others:
                other.watch.look()
        return self.answers[ref]

    def _take(self) -> None:
        """Fetch all results that are ready at once: one by one is slow for a thousand workers."""
        ready, self.waiting = ray.wait(self.waiting, num_returns=len(self.waiting), timeout=0)
        try:
            self.answers.update(zip(ready, ray.get(ready), strict=True))
        except RayError:
            for ref in ready:
                self._check(ref)
            raise

    def _check(self, ref: ray.ObjectRef[Any]) -> None:
        try:
            ray.get(ref)
        except RayError as error:
            raise self._explained(ref, error) from None

    def _explained(self, ref: ray.ObjectRef[Any], error: RayError) -> Exception:
        """Return the first cause among the errors that arrive within the grace period."""
        failures = [self._failure(ref, error)]
        others = [other for other in self.refs if other is not ref]
        ready, _ = ray.wait(others, num_returns=len(others), timeout=_GRACE_S) if others else ([], [])
        for other in ready:
            try:
                ray.get(other)
            except RayError as late:
                failures.append(self._failure(other, late))
        return first_cause(failures)

    def _failure(self, ref: ray.ObjectRef[Any], error: RayError) -> MusterError:
        """Return the failure behind an error, also of other workers whose results are arguments of this call."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        group, rank = self.group.whose(cause) or (self.group, self.refs.index(ref))
        log, node = group.log_of(rank), group.node_of(rank)
        if isinstance(cause, Raised | WorkerDied):
            return worker_error(rank, cause, log, node)
        if isinstance(cause, MusterError):
            return cause
        if isinstance(cause, OutOfMemoryError):
            return WorkerError(rank, Kind.MEMORY, "was killed by Ray: the machine ran out of memory", log, node=node)
        if isinstance(cause, RayActorError):
            return group.watch.died(rank, cause)
        if isinstance(cause, RayError):
            return group.unreachable() or WorkerError(
                rank, Kind.CONNECTION, f"{type(cause).__name__}: {cause}", log, node=node
            )
        message = f"raised: {type(cause).__name__}: {cause}"
        return WorkerError(rank, Kind.PROGRAM, message, log, node=node, trace=str(error))


class _RayFuture:
    def __init__(self, call: _Call, ref: ray.ObjectRef[Any]):
        self._call = call
        self.ref = ref

    def result(self, timeout_s: float | None = None) -> Any:
        return self._call.wait(self.ref, timeout_s)


class WorkerGroup:
    """N workers on a Ray cluster, gang-scheduled. Their processes run between `begin` and `end`.

    `avoid`: addresses of machines that are used only if there are no others; `never`: ids of machines that are not used
    at all. `say` receives progress lines while waiting for machines, `warn` warnings about machines. Raises NoMachines
    if not enough machines become available.
    """

    def __init__(
        self,
        resources: Resources,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        *,
        avoid: frozenset[str] = frozenset(),
        never: frozenset[str] = frozenset(),
        wait_s: float | None = None,
    ):
        self.resources = resources
        self.warn = warn
        self.gpus = placement.gpus_per_worker(resources)
        self.bundle = placement.bundle(resources, self.gpus)
        least = resources.min_workers or resources.workers
        self.avoid = placement.ids(placement.avoidable(self.bundle, least, avoid)) | never
        self.logs = Path()
        self.actors: list[Any] = []
        self.others: list[WorkerGroup] = []
        """Groups of the same phase: their results may be arguments of this group's calls."""
        self.placement: PlacementGroup = placement.gather(
            self.bundle,
            wanted=resources.workers,
            least=least,
            wait_s=resources.wait_for_machines if wait_s is None else wait_s,
            avoid=self.avoid,
            say=say,
        )
        self.size = self.placement.bundle_count
        try:
            self._settle()
        except BaseException:
            self.close()
            raise

    def _settle(self) -> None:
        # Ranks of one node are neighbours: a ring then crosses between nodes as seldom as it can.
        nodes = placement_group_table(self.placement)["bundles_to_node_id"]
        bundles = sorted(range(self.size), key=lambda bundle: (nodes[bundle], bundle))
        remote: Any = ray.remote
        actor = remote(concurrency_groups={"control": 2})(WorkerActor)
        self.places: list[dict[str, Any]] = []
        self.actors = [
            actor.options(
                num_cpus=1,
                num_gpus=self.gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, bundle),
            ).remote(device_type(bool(self.gpus)), _passed_on())
            for bundle in bundles
        ]
        self.watch = Watch(self, self.warn)
        self.places = self._all("place")
        self.watch.arrived()

    def begin(self, logs: Path) -> None:
        """Start a process for every worker and create the process group. Their output goes to files in `logs`."""
        self.logs = logs
        self.watch.health.clear()
        self.pids = self._each("begin", [(str(self.log_of(rank)),) for rank in range(self.size)])
        host = self.places[0]["address"]
        (port,) = self._results([self.actors[0].ask.remote("listen", host)], "listen")
        rank_infos = rank_infos_for(self.places, self.resources, device_type(bool(self.gpus)), host, port)
        key = secrets.token_bytes(
            KEY_BYTES
        )  # of this process group alone; travels as an argument, through Ray's own connections
        self._each(
            "ask",
            [
                ("join", rank_info, key, _visible_gpus(self.places, place["node"]) if self.gpus else None)
                for rank_info, place in zip(rank_infos, self.places, strict=True)
            ],
        )

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def node_of(self, rank: int) -> str:
        """Return the address of a worker's machine, empty while it is unknown."""
        return self.places[rank]["address"] if self.places else ""

    def whose(self, evidence: object) -> tuple[WorkerGroup, int] | None:
        """Return which worker of this group or the others an error names."""
        wanted = getattr(evidence, "actor_id", None)
        for group in (self, *self.others):
            for rank, place in enumerate(group.places):
                if place["actor"] == wanted:
                    return group, rank
        return None

    def unreachable(self) -> WorkerError | None:
        """Return the error of the first worker of this group or the others whose machine is lost."""
        return next(filter(None, (group.watch.unreachable() for group in (self, *self.others))), None)

    def build(self, role: str, target: str, *args: Any) -> RoleGroup:
        """Create a role on every worker. Returns the group that calls it."""
        self._all("ask", "build", role, target, args)
        return RoleGroup(self, role)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._each(method, [args] * self.size)

    def _each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        refs = [getattr(actor, method).remote(*own) for actor, own in zip(self.actors, args, strict=True)]
        return self._results(refs, str(args[0][0]) if method == "ask" else method)

    def _results(self, refs: list[ray.ObjectRef[Any]], method: str) -> list[Any]:
        call = _Call(refs, self, method)
        return [call.wait(ref, START_S) for ref in refs]

    def read_log(self, rank: int, offset: int) -> bytes:
        """Return what worker `rank` has written to its log since byte `offset`, even while it is busy; empty if it is
        gone."""
        if rank in self.watch.lost:
            return b""
        try:
            text: bytes = ray.get(self.actors[rank].read_log.remote(offset), timeout=2)
            return text
        except (RayError, GetTimeoutError, IndexError):
            return b""

    def can_avoid(self, nodes: frozenset[str]) -> bool:
        """Return whether some workers run on these machines and could run on others."""
        least = self.resources.min_workers or self.resources.workers
        mine = {place["address"] for place in self.places}
        if ray_session.lost() is not None:
            return False
        return bool(nodes & mine) and bool(placement.avoidable(self.bundle, least, nodes))

    def could_grow(self) -> bool:
        """Return whether there are free machines for more of the workers that the job requests."""
        if self.size >= self.resources.workers or ray_session.lost() is not None:
            return False
        return placement.fitting(self.bundle, self.avoid) > 0

    def end(self) -> bool:
        """End the processes, including those that hang. Returns whether all actors can start new ones."""
        ends = [actor.end.remote() for actor in self.actors]
        if self.watch.lost:
            return False
        try:
            ray.get(ends, timeout=_END_S)
        except (RayError, GetTimeoutError):
            return False
        return True

    def close(self) -> None:
        """End all actors and release the machines. If Ray is lost, they end with it."""
        if ray_session.lost() is None:
            for actor in self.actors:
                ray.kill(actor)
            remove_placement_group(self.placement)
        self.actors = []


_END_S = 10.0
"""Longest time to end processes on machines that answer."""


class RoleGroup:
    """One role of a worker group, for recipes."""

    def __init__(self, workers: WorkerGroup, role: str):
        self.workers = workers
        self.role = role
        self.size = workers.size

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Future]:
        return self._futures(method, [args] * self.size, kwargs)

    def map(self, method: str, shards: Sequence[Any], *args: Any) -> list[Future]:
        if len(shards) != self.size:
            raise ValueError(f"{len(shards)} shards for a group of {self.size} workers")
        return self._futures(method, [(shard, *args) for shard in shards], {})

    def _futures(self, method: str, args: Sequence[tuple[Any, ...]], kwargs: dict[str, Any]) -> list[Future]:
        refs = [
            actor.call.remote(self.role, method, kwargs, *map(_passed, own))
            for actor, own in zip(self.workers.actors, args, strict=True)
        ]
        call = _Call(refs, self.workers, method)
        return [_RayFuture(call, ref) for ref in refs]


def _passed(argument: Any) -> Any:
    """Replace a future by its reference: Ray sends the value to the worker directly, not through this process."""
    return argument.ref if isinstance(argument, _RayFuture) else argument


def _passed_on() -> dict[str, str]:
    """Return the environment variables that workers on other machines need.
    They are passed as an argument, since anyone on the cluster can read Ray's runtime environments."""
    requested = os.environ.get(ENV_NAMES, "").split()
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON) or name in requested}


def rank_infos_for(
    places: Sequence[dict[str, Any]], resources: Resources, device: DeviceType, host: str, port: int
) -> list[RankInfo]:
    """Return the RankInfo of every worker: local ranks count per node, and a node's cores are shared as threads."""
    by_node: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_node.setdefault(place["node"], []).append(rank)
    rank_infos = []
    for rank, place in enumerate(places):
        mates = by_node[place["node"]]
        threads = max(1, place["cores"] // len(mates)) if resources.threads == "auto" else resources.threads
        rank_infos.append(
            RankInfo(
                rank=rank,
                size=len(places),
                local_rank=mates.index(rank),
                local_size=len(mates),
                device=device,
                threads=threads,
                host=host,
                port=port,
                address=place["address"],
            )
        )
    return rank_infos


def _visible_gpus(places: Sequence[dict[str, Any]], node: str) -> str:
    """Return all GPUs of the job's workers on a node, in rank order: NCCL's fast paths need to see the neighbors."""
    return ",".join(gpu for place in places if place["node"] == node for gpu in place["gpus"])
