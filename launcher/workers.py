"""Workers on Ray: one placement group, one actor a worker, driven as a Group. The only file that says `.remote(`."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.failures import WorkerError, first_cause
from training.config import Resources
from training.distributed import Seat, join, listen, set_environment
from training.errors import MusterError, TrainingError
from training.group import Future, Worker

GATHER_S = 600.0
"""Longest wait for machines."""
START_S = 300.0
"""Longest time for starting the processes and making the process group."""
_PASSED_ON = ("HF_", "NCCL_", "MUSTER_", "AWS_", "GOOGLE_", "FSSPEC_")
_GRACE_S = 2.0
"""After a first error, how long to wait for others: a victim's death is often seen after its survivors' complaints."""


class _Process:
    """What runs in the worker's process: one worker, its log file, and answers while it is busy."""

    def __init__(self, log: str, environment: dict[str, str]):
        os.environ.update(environment)
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        self.listener: socket.socket | None = None

    def place(self) -> dict[str, Any]:
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
            "cores": len(os.sched_getaffinity(0)),
            "pid": os.getpid(),
        }

    def listen(self, host: str) -> int:
        self.listener = listen(host)
        return self.listener.getsockname()[1]

    def join(self, seat: Seat, visible_gpus: str | None) -> None:
        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        set_environment(seat)
        join(seat, self.listener)
        self.worker = Worker(seat)

    def build(self, role: str, target: str, args: tuple) -> None:
        self.worker.build(role, target, *args)

    def call(self, role: str, method: str, args: tuple, kwargs: dict) -> Any:
        return self.worker.call(role, method, *args, **kwargs)

    @ray.method(concurrency_group="control")
    def read_log(self, offset: int) -> bytes:
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read(1 << 16)


class _Call:
    """One method called on every worker. It fails as a whole: an error of one worker is an error of all of them."""

    def __init__(self, refs: Sequence[ray.ObjectRef], group: WorkerGroup, method: str):
        self.refs = list(refs)
        self.group = group
        self.method = method
        self.began = time.monotonic()
        self.waiting = list(refs)

    def wait(self, ref: ray.ObjectRef, timeout_s: float | None) -> Any:
        """The answer of one worker, within `timeout_s` of the call. Raises the first cause as soon as any worker fails."""
        while ref in self.waiting:
            left = None if timeout_s is None else max(0.0, self.began + timeout_s - time.monotonic())
            ready, waiting = ray.wait(self.waiting, num_returns=1, timeout=left)
            if not ready:
                raise TrainingError(f"{self.method} did not answer within {timeout_s:.0f} s on {self._ranks(waiting)}")
            self._check(ready[0])
            self.waiting = waiting
        return ray.get(ref)

    def _check(self, ref: ray.ObjectRef) -> None:
        try:
            ray.get(ref)
        except RayError as error:
            raise self._explained(ref, error) from None

    def _explained(self, ref: ray.ObjectRef, error: RayError) -> Exception:
        """The first cause among the errors that come in within the grace period."""
        failures = [self._failure(ref, error)]
        others = [other for other in self.refs if other is not ref]
        ready, _ = ray.wait(others, num_returns=len(others), timeout=_GRACE_S) if others else ([], [])
        for other in ready:
            try:
                ray.get(other)
            except RayError as late:
                failures.append(self._failure(other, late))
        return first_cause(failures)

    def _failure(self, ref: ray.ObjectRef, error: RayError) -> WorkerError | MusterError:
        rank = self.refs.index(ref)
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, MusterError):
                return error.cause
            return WorkerError(
                rank, "raised", f"{type(error.cause).__name__}: {error.cause}", self.group.log_of(rank), str(error)
            )
        if isinstance(error, RayActorError):
            return WorkerError(rank, "died", str(error).strip(), self.group.log_of(rank))
        return WorkerError(rank, "failed", f"{type(error).__name__}: {error}", self.group.log_of(rank))

    def _ranks(self, refs: Sequence[ray.ObjectRef]) -> str:
        return "workers " + ", ".join(str(self.refs.index(ref)) for ref in refs)


class _RayFuture:
    def __init__(self, call: _Call, ref: ray.ObjectRef):
        self._call = call
        self._ref = ref

    def result(self, timeout_s: float | None = None) -> Any:
        return self._call.wait(self._ref, timeout_s)


class WorkerGroup:
    """N workers on a Ray cluster, started together or not at all.

    `say` receives a line when gathering takes time. Raises TrainingError if the machines do not come.
    """

    def __init__(self, resources: Resources, logs: Path, say: Callable[[str], None]):
        self.size = resources.workers
        self.logs = logs
        gpus = _gpus_per_worker(resources)
        bundle = {"CPU": 1.0, "GPU": float(gpus)} if gpus else {"CPU": 1.0}
        if resources.accelerator:
            bundle[f"accelerator_type:{resources.accelerator}"] = 0.001
        self.actors: list[Any] = []
        self.placement = _gather(bundle, self.size, say)
        try:
            self._start(resources, gpus)
        except BaseException:
            self.close()
            raise

    def _start(self, resources: Resources, gpus: int) -> None:
        # Ranks of one node are neighbours: a ring then crosses between nodes as seldom as it can.
        nodes = placement_group_table(self.placement)["bundles_to_node_id"]
        bundles = sorted(range(self.size), key=lambda bundle: (nodes[bundle], bundle))
        process: Any = ray.remote(concurrency_groups={"control": 1})(_Process)  # type: ignore[call-overload]
        self.actors = [
            process.options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, bundle),
            ).remote(str(self.log_of(rank)), _passed_on())
            for rank, bundle in enumerate(bundles)
        ]
        places = self._all("place")
        self.pids = [place["pid"] for place in places]
        host = places[0]["address"]
        (port,) = self._results([self.actors[0].listen.remote(host)], "listen")
        seats = seats_for(places, resources, "cuda" if gpus else "cpu", host, port)
        joins = []
        for actor, seat, place in zip(self.actors, seats, places, strict=True):
            joins.append(actor.join.remote(seat, _visible_gpus(places, place["node"]) if gpus else None))
        self._results(joins, "join")

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def build(self, role: str, target: str, *args: Any) -> RoleGroup:
        """Make a role on every worker; returns the group that drives it."""
        self._all("build", role, target, args)
        return RoleGroup(self, role)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._results([getattr(actor, method).remote(*args) for actor in self.actors], method)

    def _results(self, refs: list[ray.ObjectRef], method: str) -> list[Any]:
        call = _Call(refs, self, method)
        return [call.wait(ref, START_S) for ref in refs]

    def read_log(self, rank: int, offset: int) -> bytes:
        """What worker `rank` has written to its log since byte `offset`; works while it is busy. Empty if it is gone."""
        try:
            return ray.get(self.actors[rank].read_log.remote(offset), timeout=5)
        except (RayError, GetTimeoutError):
            return b""

    def close(self) -> None:
        """End the workers now, also those that hang, and give the machines back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)
        self.actors = []


class RoleGroup:
    """One role of a worker group, as recipes see it."""

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

    def _futures(self, method: str, args: Sequence[tuple], kwargs: dict) -> list[Future]:
        refs = [
            actor.call.remote(self.role, method, own, kwargs)
            for actor, own in zip(self.workers.actors, args, strict=True)
        ]
        call = _Call(refs, self.workers, method)
        return [_RayFuture(call, ref) for ref in refs]


def _passed_on() -> dict[str, str]:
    """What workers on other machines need of this process's environment; an argument, since Ray shows runtime environments."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}


def _gpus_per_worker(resources: Resources) -> int:
    if resources.gpus_per_worker == "auto":
        return 1 if ray.cluster_resources().get("GPU", 0) else 0
    return resources.gpus_per_worker


def _gather(bundle: dict[str, float], count: int, say: Callable[[str], None]) -> PlacementGroup:
    group = placement_group([bundle] * count, strategy="PACK")
    began = time.monotonic()
    patience = 3.0
    while not group.wait(patience):
        waited = time.monotonic() - began
        state = _shortage(bundle, count)
        if waited > GATHER_S:
            remove_placement_group(group)
            raise TrainingError(
                f"the machines did not come within {GATHER_S:.0f} s: {state}; ask for fewer resources.workers"
            )
        say(f"waiting for machines since {waited:.0f} s: {state}")
        patience = 15.0
    return group


def _shortage(bundle: dict[str, float], count: int) -> str:
    wanted = [kind for kind in bundle if kind != "CPU"] or ["CPU"]
    there, free = ray.cluster_resources(), ray.available_resources()
    has = ", ".join(f"{there.get(kind, 0):.0f} {kind} ({free.get(kind, 0):.0f} free)" for kind in wanted)
    return f"{count} workers wanted, each with one {' and one '.join(wanted)}; the cluster has {has}"


def seats_for(places: Sequence[dict], resources: Resources, device: Any, host: str, port: int) -> list[Seat]:
    """The seat of every worker from where it sits: rank as given, local rank by node, threads shared on a node."""
    by_node: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_node.setdefault(place["node"], []).append(rank)
    seats = []
    for rank, place in enumerate(places):
        mates = by_node[place["node"]]
        threads = max(1, place["cores"] // len(mates)) if resources.threads == "auto" else resources.threads
        seats.append(
            Seat(
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
    return seats


def _visible_gpus(places: Sequence[dict], node: str) -> str:
    """All GPUs of the job's workers on a node, in order of rank: NCCL's fast paths need to see the neighbours."""
    return ",".join(gpu for place in places if place["node"] == node for gpu in place["gpus"])
