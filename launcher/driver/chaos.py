"""`muster chaos`: injects faults by killing random parts of a running job, to test recovery before it matters."""

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
        raise InputError.of(run.address, f"is not running (it is {run.state()}); chaos needs a running job")
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
    """Return whether the step of the last failure is done: a second failure at the same step would
    count as a program error and end the run."""
    failure = next((event for event in reversed(run.events()) if event["event"] == "incident"), None)
    return failure is None or any(row["step"] >= failure["step"] for row in run.metrics(failure["phase"])[-1:])


def _killer(run: RunFolder, victim: Victim) -> Callable[[random.Random], str | None]:
    """Return a function that kills one victim and returns its description, or None if there is none at that moment."""
    if victim == "driver":
        return lambda chance: _kill_driver(run)
    if address := os.environ.get("RAY_ADDRESS"):
        return lambda chance: _kill_through_ray(run, victim, chance, address)
    if victim == "node":
        raise InputError.of("--kill", "this run has one machine; set RAY_ADDRESS to kill a machine of its cluster")
    return lambda chance: _kill_here(run, chance)


def _workers(run: RunFolder) -> list[dict[str, Any]]:
    """Return the workers of the current attempt; empty while they start."""
    workers: list[dict[str, Any]] = []
    for event in run.events():
        if event["event"] in ("started", "incident"):
            workers = []
        elif event["event"] == "workers":
            workers = event["workers"]
    return workers


def _kill_driver(run: RunFolder) -> str | None:
    """Kill the driver that the lock file names. It must run on this machine."""
    words = (run.folder / LOCK).read_text().split()
    pid, host = int(words[1]), words[3]
    if host != os.uname().nodename or not psutil.pid_exists(pid):
        raise InputError.of(run.address, f"its driver is process {pid} on {host}; run this command there")
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
