"""The machines of a Ray cluster, their free resources, and gang scheduling of workers on them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray_node import PRICE
from launcher.workers import autoscaler, ray_compat, ray_session
from launcher.workers.errors import NoMachines
from training.config import Resources
from training.errors import InputError

_FIRST_WORD_S, _NEXT_WORD_S, _NEXT_LOOK_S = 3.0, 15.0, 3.0
"""Seconds before the first progress line, between two lines, and between two looks."""
_LOOK_S = 0.1
_MARKET = "ray.io/market-type"
"""Label of machines in clusters that Muster starts."""
_SETTLE_S = 30.0
"""Longest time to schedule a gang on machines that are free."""


def gpus_per_worker(resources: Resources) -> int:
    if resources.gpus_per_worker == "auto":
        return 1 if ray.cluster_resources().get("GPU", 0) else 0
    return resources.gpus_per_worker


def bundle(resources: Resources, gpus: int) -> dict[str, float]:
    """Return the resources of one worker, by Ray's names."""
    needs = {"CPU": 1.0, "GPU": float(gpus)} if gpus else {"CPU": 1.0}
    return needs | ({f"accelerator_type:{resources.accelerator}": 0.001} if resources.accelerator else {})


def node(node_id: str) -> dict[str, Any]:
    """Return Ray's record of a machine; empty if it has none."""
    return by_id().get(node_id, {})


def by_id() -> dict[str, dict[str, Any]]:
    """Return Ray's records of all machines by id, including those that are gone."""
    return {found["NodeID"]: found for found in ray.nodes()}


def draining() -> dict[str, float]:
    """Return the machines that are being drained, by id, with their deadline (Unix time, s; 0: unknown)."""
    return {node_id: deadline_ms / 1000 for node_id, deadline_ms in ray_compat.draining_nodes().items()}


def fitting(needs: Mapping[str, float], avoid: frozenset[str] = frozenset()) -> int:
    """Return how many workers with these needs fit on free machines, without those to avoid (ids)."""
    leaving = draining()
    alive = {found["NodeID"] for found in ray.nodes() if found["Alive"]}
    usable = {
        node_id: free
        for node_id, free in ray_compat.free_resources().items()
        if node_id in alive and node_id not in avoid and node_id not in leaving
    }
    return sum(_places(free, needs) for free in usable.values())


def avoidable(needs: Mapping[str, float], least: int, avoid: frozenset[str]) -> frozenset[str]:
    """Return the machines to avoid; none if `least` workers do not fit without them."""
    others = [found for found in ray.nodes() if found["Alive"] and found["NodeManagerAddress"] not in avoid]
    return avoid if sum(_places(found["Resources"], needs) for found in others) >= least else frozenset()


def ids(addresses: frozenset[str]) -> frozenset[str]:
    """Return the ids of the machines with these addresses."""
    found = ray.nodes() if addresses else []
    return frozenset(node["NodeID"] for node in found if node["NodeManagerAddress"] in addresses)


def _places(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """Return how many workers fit into these resources."""
    return min(int((resources.get(kind, 0.0) + 1e-6) // amount) for kind, amount in needs.items())


def gather(
    needs: Mapping[str, float],
    *,
    wanted: int,
    least: int,
    wait_s: float,
    avoid: frozenset[str],
    say: Callable[[str], None],
) -> PlacementGroup:
    """Reserve resources for `wanted` workers, or after `wait_s` for as many as fit, if those are `least` or more.

    If there are enough machines and other jobs use them, it waits without a limit. `avoid`: ids of machines that must
    not be used. Raises NoMachines, RayLost, and InputError if the autoscaler reports that the request can never be met.
    """
    return _Search(needs, least, wait_s, avoid, say).find(wanted)


class _Search:
    """The search for machines for one gang."""

    def __init__(
        self, needs: Mapping[str, float], least: int, wait_s: float, avoid: frozenset[str], say: Callable[[str], None]
    ):
        self.needs, self.least, self.wait_s, self.avoid, self.say = needs, least, wait_s, avoid, say
        self.began, self.began_at = time.monotonic(), time.time()
        self.on_demand: bool | None = None
        """Whether to request on-demand machines because no spot machines are available.
        False: there are no on-demand pools. None: not yet."""

    def find(self, wanted: int) -> PlacementGroup:
        said_at, told, patience = self.began - _NEXT_WORD_S, None, _FIRST_WORD_S
        group = self._request(wanted)
        try:
            while not _comes(group, self._until(patience)):
                now, patience = time.monotonic(), _NEXT_LOOK_S
                waited, state = now - self.began, _shortage(self.needs, wanted)
                outlook = autoscaler.outlook(group.id.hex(), self.began_at)
                if outlook is not None:
                    state += f"; {outlook}"
                    if self._elsewhere(outlook):
                        remove_placement_group(group)
                        group = self._request(wanted)
                    elif outlook.impossible and not _others_work(self.needs):
                        remove_placement_group(group)
                        return self._as_few_as_may_be(wanted, state)
                if waited >= self.wait_s and not _taken(self.needs, self.least, self.avoid):
                    remove_placement_group(group)
                    return self._smaller(wanted, f"{state}, after {waited:.0f} s")
                if now - said_at >= _NEXT_WORD_S or outlook != told:
                    said_at, told = now, outlook
                    self.say(f"waiting for machines for {waited:.0f} s: {state}")
        except BaseException:
            if ray_session.lost() is None:
                remove_placement_group(group)
            raise
        return group

    def _until(self, patience: float) -> float:
        """Return how long to wait for the next look: at most until the end of `wait_s`, before that."""
        left = self.began + self.wait_s - time.monotonic()
        return min(patience, left) if left > 0 else patience

    def _request(self, count: int) -> PlacementGroup:
        selector = {"ray.io/node-id": f"!in({','.join(sorted(self.avoid))})"} if self.avoid else {}
        # Whatever is free is taken; the autoscaler is asked for the rest.
        free = min(count, fitting(self.needs, self.avoid)) if self.on_demand else count
        selectors = [selector] * free + [{**selector, _MARKET: "on-demand"}] * (count - free)
        wanted = selectors if any(selectors) else None
        needs = [dict(self.needs)] * count
        request: PlacementGroup = placement_group(needs, strategy="PACK", bundle_label_selector=wanted)
        return request

    def _elsewhere(self, outlook: autoscaler.Outlook) -> bool:
        """Return whether to request machines of the other market (spot or on-demand) from now on.

        Ray's autoscaler requests the machine type with the highest priority repeatedly, even if the cloud has none.
        """
        if self.on_demand is None and outlook.refused:
            self.on_demand = True
            self.say(f"{'; '.join(outlook.refused)}; requesting on-demand machines")
            return True
        if self.on_demand and outlook.impossible:
            self.on_demand = False
            self.say("there are no on-demand pools; requesting the refused machines again")
            return True
        return False

    def _as_few_as_may_be(self, wanted: int, state: str) -> PlacementGroup:
        """Request the minimum, after the autoscaler reported that it can never provide `wanted`."""
        if self.least == wanted:
            raise InputError.of(
                "resources.workers",
                f"the cluster cannot grow that large: {state}; set fewer workers, or enlarge its pools",
            )
        self.say(
            f"the cluster cannot grow that large: {state}; requesting {self.least} workers (resources.min_workers)"
        )
        return self.find(self.least)

    def _smaller(self, wanted: int, state: str) -> PlacementGroup:
        count = min(wanted, fitting(self.needs, self.avoid))
        if count < self.least:
            fewer = "" if self.least == wanted else f", resources.min_workers is {self.least}"
            raise NoMachines(f"not enough machines became available: {state}{fewer}; lower resources.workers")
        group = self._request(count)
        if not _comes(group, _SETTLE_S):
            remove_placement_group(group)
            raise NoMachines(f"another job took the free machines: {_shortage(self.needs, count)}")
        self.say(f"continuing with {count} of {wanted} workers: {state}")
        return group


def _others_work(needs: Mapping[str, float]) -> bool:
    """Return whether any resource that a worker needs is in use; then a request may be possible later."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return any(free.get(kind, 0.0) < there.get(kind, 0.0) for kind in needs)


def _taken(needs: Mapping[str, float], least: int, avoid: frozenset[str]) -> bool:
    """Return whether `least` workers would fit if no other job ran, but do not fit now."""
    there = [found for found in ray.nodes() if found["Alive"] and found["NodeID"] not in avoid]
    return fitting(needs, avoid) < least <= sum(_places(found["Resources"], needs) for found in there)


def _comes(group: PlacementGroup, within_s: float) -> bool:
    """Wait for a placement group (its own `wait` takes whole seconds). Returns whether it is ready. Raises RayLost."""
    deadline = time.monotonic() + within_s
    while not _has_places(group):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _has_places(group: PlacementGroup) -> bool:
    ray_session.check()
    return bool(placement_group_table(group).get("state") == "CREATED")


def _shortage(needs: Mapping[str, float], count: int) -> str:
    wanted = [kind for kind in needs if kind != "CPU"] or ["CPU"]
    there, free = ray.cluster_resources(), ray.available_resources()
    has = ", ".join(f"{there.get(kind, 0):.0f} {kind} ({free.get(kind, 0):.0f} free)" for kind in wanted)
    return f"{count} workers need one {' and one '.join(wanted)} each; the cluster has {has}"


def price(node_ids: Collection[str]) -> float | None:
    """Return the price per hour of the machines with these ids and the head; None if one has no price."""
    there = [found for found in ray.nodes() if found["Alive"]]
    used = [found for found in there if found["NodeID"] in node_ids]
    head = [
        found
        for found in there
        if ray_compat.HEAD_RESOURCE in found["Resources"] and found not in used and PRICE in found["Labels"]
    ]
    prices = [found["Labels"].get(PRICE) for found in (*used, *head)]
    return None if None in prices else sum(map(float, prices))


def kill_on(address: str, pid: int | None) -> None:
    """Kill a process on a machine by its process id; None: Ray and its processes there. For `muster chaos`."""
    node_id = next(
        found["NodeID"] for found in ray.nodes() if found["NodeManagerAddress"] == address and found["Alive"]
    )
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    remote: Any = ray.remote
    task = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill)
    with suppress(RayError):  # it may be its own end
        ray.get(task.remote(pid), timeout=30)


def _kill(pid: int | None) -> None:
    os.kill(os.getppid() if pid is None else pid, signal.SIGKILL)
