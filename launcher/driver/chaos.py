"""`muster chaos`: kills parts of a run at random, for drills. What a run survives it should have
survived before it matters."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import psutil

from launcher.runfolder.run_folder import LOCK, RunFolder
from training.errors import InputError

Victim = Literal["rank", "node", "driver"]
_OWN = ("127.0.0.1", "localhost")
_LOOK_S = 0.2


def drill(
    run: RunFolder, victim: Victim, *, every_s: float, times: int | None, seed: int, say: Callable[[str], None]
) -> int:
    """Kill a `victim` every so often while the run is running, at most `times`; returns how many were killed.

    Raises InputError if the run is not running, or has no such victim.
    """
    if run.state() != "running":
        raise InputError.of(run.address, f"is not running (it is {run.state()}); a drill needs a run at work")
    chance = random.Random(seed)
    kill = _killer(run, victim)
    killed = 0
    while times is None or killed < times:
        time.sleep(every_s)
        while run.state() == "running" and not _beyond_its_last_failure(run):
            time.sleep(_LOOK_S)
        if run.state() != "running":
            break
        if (who := kill(chance)) is not None:
            killed += 1
            say(f"killed {who}")
    return killed


def _beyond_its_last_failure(run: RunFolder) -> bool:
    """Whether that step is done: the same failure at the same step again is taken
    for a fault of the program, and the run given up."""
    failure = next((event for event in reversed(run.events()) if event["event"] == "incident"), None)
    return failure is None or any(row["step"] >= failure["step"] for row in run.metrics(failure["phase"])[-1:])


def _killer(run: RunFolder, victim: Victim) -> Callable[[random.Random], str | None]:
    """A function that kills one and says whom; None if there was nobody at that moment."""
    if victim == "driver":
        return lambda chance: _kill_driver(run)
    if address := os.environ.get("RAY_ADDRESS"):
        return lambda chance: _kill_through_ray(run, victim, chance, address)
    if victim == "node":
        raise InputError.of("--kill", "this run has one machine; with RAY_ADDRESS a machine of its cluster is killed")
    return lambda chance: _kill_here(run, chance)


def _workers(run: RunFolder) -> list[dict[str, Any]]:
    """Those of the attempt under way; none while it gathers them."""
    workers: list[dict[str, Any]] = []
    for event in run.events():
        if event["event"] in ("started", "incident"):
            workers = []
        elif event["event"] == "workers":
            workers = event["workers"]
    return workers


def _kill_driver(run: RunFolder) -> str | None:
    """The lock says which process it is, and on which machine: only one on this machine is killed."""
    words = (run.folder / LOCK).read_text().split()
    pid, host = int(words[1]), words[3]
    if host != os.uname().nodename or not psutil.pid_exists(pid):
        raise InputError.of(run.address, f"its driver is process {pid} on {host}; run the drill there")
    os.kill(pid, signal.SIGKILL)
    return f"the driver, process {pid}"


def _kill_here(run: RunFolder, chance: random.Random) -> str | None:
    own = [worker for worker in _workers(run) if worker["machine"] in _OWN]
    if not own:
        return None
    worker = chance.choice(own)
    with suppress(ProcessLookupError):
        os.kill(worker["pid"], signal.SIGKILL)
        return f"worker {worker['rank']}, process {worker['pid']}"
    return None


def _kill_through_ray(run: RunFolder, victim: Victim, chance: random.Random, address: str) -> str | None:
    from launcher.workers import placement
    from launcher.workers.ray_session import ray_session

    workers = _workers(run)
    if not workers:
        return None
    worker = chance.choice(workers)
    with ray_session(0):
        placement.kill_on(worker["machine"], worker["pid"] if victim == "rank" else None)
    where = f"on {worker['machine']}"
    return f"worker {worker['rank']} {where}" if victim == "rank" else f"Ray {where}"
