"""The Ray actor of a worker. This module imports little, since every worker waits for its imports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from launcher.workers import unpack_inputs
from launcher.workers.errors import Raised, WorkerDied
from launcher.workers.supervisor import WorkerHealth, WorkerSupervisor


class WorkerActor:
    """Runs a worker's supervisor and reports its location. The control methods answer while the worker is busy."""

    def __init__(self, device: str, environment: dict[str, str]):
        os.environ.update(environment)
        self.environment = environment
        """The worker needs it too, since the fork server may have started before it was set."""
        unpack_inputs.land()
        self.host = WorkerSupervisor(device)
        self.log = Path()

    def place(self) -> dict[str, Any]:
        return {
            "actor": _own_id(),
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
            "cores": len(os.sched_getaffinity(0)),
        }

    def begin(self, log: str) -> int:
        self.log = Path(log)
        return self.host.begin(log, self.environment)

    def ask(self, name: str, *args: Any) -> Any:
        with _signed():
            return self.host.ask(name, *args)

    def call(self, role: str, method: str, kwargs: dict[str, Any], *args: Any) -> Any:
        return self.ask("call", role, method, args, kwargs)

    @ray.method(concurrency_group="control")
    def end(self) -> None:
        self.host.end()

    @ray.method(concurrency_group="control")
    def health(self) -> WorkerHealth:
        return self.host.health()

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        return self.host.stacks(self.log)

    @ray.method(concurrency_group="control")
    def read_log(self, offset: int) -> bytes:
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read(1 << 16)


def _own_id() -> str | None:
    return ray.get_runtime_context().get_actor_id()


@contextmanager
def _signed() -> Iterator[None]:
    """Set the actor id in evidence, as Ray does in its own errors: a call of other workers that takes this result as
    an argument fails with it."""
    try:
        yield
    except (Raised, WorkerDied) as evidence:
        evidence.actor_id = _own_id()
        raise
