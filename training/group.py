"""The interface of a group of workers for training code, and its implementation in this process.

A worker is one process; a group is N of them that form one process group; a worker hosts one or more roles. Recipes see
groups alone: `launcher/` implements the same protocol on Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from training.process.distributed import RankInfo


class Future(Protocol):
    """An answer that may still be on its way."""

    def result(self, timeout_s: float | None = None) -> Any:
        """The answer. Raises what the worker raised, or TimeoutError."""
        ...


class Group(Protocol):
    """The workers of one role, driven together."""

    size: int

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Future]:
        """Call the method on every worker; one future a worker, in rank order.

        An argument, or a shard, that is a future stands for its answer, which goes to the workers by itself.
        """
        ...

    def map(self, method: str, shards: Sequence[Any], *args: Any) -> list[Future]:
        """Call the method with shard i on worker i. Raises ValueError unless there is one shard a worker."""
        ...


def results(futures: Sequence[Future], timeout_s: float | None = None) -> list[Any]:
    """All answers, in rank order. Raises the error of the first rank that has one."""
    return [future.result(timeout_s) for future in futures]


def results_of(groups: Mapping[str, Group], method: str, *args: Any, timeout_s: float) -> dict[str, list[Any]]:
    """The answers of all roles to the same call, which they work on at the same time where they can."""
    asked = {role: group.call(method, *args) for role, group in groups.items()}
    return {role: results(futures, timeout_s) for role, futures in asked.items()}


class Worker:
    """What one worker process is: a seat in the group and the roles it hosts. Knows nothing of how it was started."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info = rank_info
        self.roles: dict[str, Any] = {}

    def build(self, role: str, target: str, *args: Any) -> None:
        """Make role `role`, an instance of the class that the import string names,
        with the seat as its first argument."""
        from training.recipes import resolve

        self.roles[role] = resolve(target)(self.rank_info, *args)

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the role answers. `begin_profile` and `end_profile` are the worker's own, whatever roles it hosts."""
        from training.profiling import profiler

        if method in ("begin_profile", "end_profile"):
            return getattr(profiler, method)(self.rank_info, *args)
        with profiler.part(f"{role}.{method}"):
            return getattr(self.roles[role], method)(*args, **kwargs)


class Done:
    """A future that is already there."""

    def __init__(self, answer: Any = None, error: Exception | None = None):
        self._answer = answer
        self._error = error

    def result(self, timeout_s: float | None = None) -> Any:
        if self._error is not None:
            raise self._error
        return self._answer


def arrived(argument: Any) -> Any:
    """The answer that an argument stands for, if it is a future."""
    return argument.result() if hasattr(argument, "result") else argument


class InlineGroup:
    """A role of one worker that lives in this process: for a debugger, a single GPU, and tests."""

    size = 1

    def __init__(self, worker: Worker, role: str):
        self.worker = worker
        self.role = role

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Future]:
        try:
            return [Done(self.worker.call(self.role, method, *map(arrived, args), **kwargs))]
        except Exception as error:
            return [Done(error=error)]

    def map(self, method: str, shards: Sequence[Any], *args: Any) -> list[Future]:
        if len(shards) != 1:
            raise ValueError(f"{len(shards)} shards for a group of 1 worker")
        return self.call(method, shards[0], *args)
