"""The machines of a Ray cluster: what there is, what is free, and a gang of places on it."""

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
from launcher.workers import autoscaler, ray_session
from launcher.workers.errors import NoMachines
from training.config import Resources
from training.errors import InputError

_FIRST_WORD_S, _NEXT_WORD_S, _NEXT_LOOK_S = 3.0, 15.0, 3.0
"""How long to wait silently."""
_LOOK_S = 0.1
_MARKET = "ray.io/market-type"
"""Label of machines that Muster's clusters start."""
_HEAD = "node:__internal_head__"
"""What Ray gives the head to be found by."""
_SETTLE_S = 30.0
"""Longest time for a gang of places on machines that are there and free."""


def gpus_per_worker(resources: Resources) -> int:
    if resources.gpus_per_worker == "auto":
        return 1 if ray.cluster_resources().get("GPU", 0) else 0
    return resources.gpus_per_worker


def bundle(resources: Resources, gpus: int) -> dict[str, float]:
    """What one worker takes, in Ray's words."""
    needs = {"CPU": 1.0, "GPU": float(gpus)} if gpus else {"CPU": 1.0}
    return needs | ({f"accelerator_type:{resources.accelerator}": 0.001} if resources.accelerator else {})


def node(node_id: str) -> dict[str, Any]:
    """What Ray knows of a machine; empty if it does not."""
    return by_id().get(node_id, {})


def by_id() -> dict[str, dict[str, Any]]:
    """What Ray knows of all machines, also of those that are gone."""
    return {found["NodeID"]: found for found in ray.nodes()}


def draining() -> dict[str, float]:
    """Machines that are being taken back, by id, with the time (Unix, s; 0: not said) when they will be gone."""
    from ray._private.state import state

    return {node_id: deadline_ms / 1000 for node_id, deadline_ms in state.get_draining_nodes().items()}


def fitting(needs: Mapping[str, float], avoid: frozenset[str] = frozenset()) -> int:
    """How many workers that need this would find a free place on other machines than those to avoid (ids)."""
    from ray._private.state import available_resources_per_node

    leaving = draining()
    alive = {found["NodeID"] for found in ray.nodes() if found["Alive"]}
    usable = {
        node_id: free
        for node_id, free in available_resources_per_node().items()
        if node_id in alive and node_id not in avoid and node_id not in leaving
    }
    return sum(_places(free, needs) for free in usable.values())


def avoidable(needs: Mapping[str, float], least: int, avoid: frozenset[str]) -> frozenset[str]:
    """The machines to avoid, none if `least` workers would not find a place without them."""
    others = [found for found in ray.nodes() if found["Alive"] and found["NodeManagerAddress"] not in avoid]
    return avoid if sum(_places(found["Resources"], needs) for found in others) >= least else frozenset()


def ids(addresses: frozenset[str]) -> frozenset[str]:
    """Of the machines with these addresses."""
    found = ray.nodes() if addresses else []
    return frozenset(node["NodeID"] for node in found if node["NodeManagerAddress"] in addresses)


def _places(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers find a place in so much of everything."""
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
    """Places for `wanted` workers, or after `wait_s` for as many as there is room for, if those are `least` or more.

    Where there are enough machines and others use them, it waits its turn, however long that takes. `avoid`: ids of
    machines that are not to be used. Raises NoMachines, RayLost, and InputError for what an autoscaler says can never
    come.
    """
    return _Search(needs, least, wait_s, avoid, say).find(wanted)


class _Search:
    """For the places of one gang."""

    def __init__(
        self, needs: Mapping[str, float], least: int, wait_s: float, avoid: frozenset[str], say: Callable[[str], None]
    ):
        self.needs, self.least, self.wait_s, self.avoid, self.say = needs, least, wait_s, avoid, say
        self.began, self.began_at = time.monotonic(), time.time()
        self.on_demand: bool | None = None
        """Whether machines are asked for on demand because the spot ones did not come.
        False: there are none. None: not yet."""

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
                    self.say(f"waiting for machines since {waited:.0f} s: {state}")
        except BaseException:
            if ray_session.lost() is None:
                remove_placement_group(group)
            raise
        return group

    def _until(self, patience: float) -> float:
        """How long to wait for the next look: not beyond the end of `wait_s`, as long as that lies ahead."""
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
        """Whether to ask in another market from now on.

        Ray's autoscaler asks for the kind of machine with the highest priority again and again,
        also where the cloud has none.
        """
        if self.on_demand is None and outlook.refused:
            self.on_demand = True
            self.say(f"{'; '.join(outlook.refused)}; asking for machines on demand")
            return True
        if self.on_demand and outlook.impossible:
            self.on_demand = False
            self.say("there are no pools with machines on demand; asking again for those that were refused")
            return True
        return False

    def _as_few_as_may_be(self, wanted: int, state: str) -> PlacementGroup:
        """After the autoscaler has said that it can never bring `wanted`."""
        if self.least == wanted:
            raise InputError.of(
                "resources.workers", f"the cluster cannot grow so far: {state}; ask for fewer, or give it larger pools"
            )
        self.say(f"the cluster cannot grow so far: {state}; asking for {self.least}, resources.min_workers")
        return self.find(self.least)

    def _smaller(self, wanted: int, state: str) -> PlacementGroup:
        count = min(wanted, fitting(self.needs, self.avoid))
        if count < self.least:
            fewer = "" if self.least == wanted else f", resources.min_workers is {self.least}"
            raise NoMachines(f"the machines did not come: {state}{fewer}; ask for fewer resources.workers")
        group = self._request(count)
        if not _comes(group, _SETTLE_S):
            remove_placement_group(group)
            raise NoMachines(f"the machines that were free are free no longer: {_shortage(self.needs, count)}")
        self.say(f"going on with {count} of {wanted} workers: {state}")
        return group


def _others_work(needs: Mapping[str, float]) -> bool:
    """Whether anything that a worker needs is in use; then what is impossible now need not be later."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return any(free.get(kind, 0.0) < there.get(kind, 0.0) for kind in needs)


def _taken(needs: Mapping[str, float], least: int, avoid: frozenset[str]) -> bool:
    """Whether `least` workers would find a place if nobody else were there, and now do not."""
    there = [found for found in ray.nodes() if found["Alive"] and found["NodeID"] not in avoid]
    return fitting(needs, avoid) < least <= sum(_places(found["Resources"], needs) for found in there)


def _comes(group: PlacementGroup, within_s: float) -> bool:
    """Whether a gang has its places within a time. (Its own `wait` takes whole seconds.) Raises RayLost."""
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
    return f"{count} workers wanted, each with one {' and one '.join(wanted)}; the cluster has {has}"


def price(node_ids: Collection[str]) -> float | None:
    """What the machines with these ids cost in an hour, whole, and the head; None if one of them does not say."""
    there = [found for found in ray.nodes() if found["Alive"]]
    used = [found for found in there if found["NodeID"] in node_ids]
    head = [found for found in there if _HEAD in found["Resources"] and found not in used and PRICE in found["Labels"]]
    prices = [found["Labels"].get(PRICE) for found in (*used, *head)]
    return None if None in prices else sum(map(float, prices))


def kill_on(address: str, pid: int | None) -> None:
    """Kill a process on a machine by its id there; None: Ray itself, and all that it runs there. For drills."""
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
