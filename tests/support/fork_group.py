"""Workers for tests: processes forked from one that has imported everything, driven as a Group.
A third of a second a group."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from training.errors import MusterError, TrainingError
from training.group import Worker, arrived
from training.process.distributed import RankInfo, join, leave, listen, set_environment

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])
_TIMEOUT_S = 120


class _Answer:
    def __init__(self, pipe: Any, number: int = 0):
        self.pipe = pipe
        self.number = number
        self.known: list[Any] = []
        """The answer, once it was asked for."""

    def result(self, timeout_s: float | None = None) -> Any:
        if not self.known:
            self.known.append(self._received())
        return self.known[0]

    def _received(self) -> Any:
        answered = -1
        while answered < self.number:  # nobody has asked for the answers to earlier calls
            if not self.pipe.poll(_TIMEOUT_S):
                raise TimeoutError("a test worker did not answer")
            try:
                answered, ok, value = self.pipe.recv()
            except (EOFError, ConnectionError):
                raise TrainingError("a worker died") from None
        if not ok:
            raise value if isinstance(value, MusterError) else TrainingError(f"a worker failed: {value!r}") from value
        return value


class ForkWorkers:
    """`size` workers that host some roles, all built from the same arguments. Use as a context manager."""

    def __init__(self, size: int, roles: Mapping[str, str], *args: Any, threads: int = 1):
        self.size = size
        self.calls = 0
        key = secrets.token_bytes(32)
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            start = (theirs, rank, size, threads, dict(roles), args, _environment(), key)
            process = _CONTEXT.Process(target=_serve, args=start, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        port = _Answer(self.pipes[0]).result()
        for pipe in self.pipes:
            pipe.send(port)
        for pipe in self.pipes:
            _Answer(pipe).result()

    def send(self, role: str, calls: Sequence[tuple]) -> list[_Answer]:
        self.calls += 1
        for pipe, call in zip(self.pipes, calls, strict=True):
            with suppress(ConnectionError):  # it died; its answer says so
                pipe.send((self.calls, role, *call))
        return [_Answer(pipe, self.calls) for pipe in self.pipes]

    def __getitem__(self, role: str) -> ForkRole:
        return ForkRole(self, role)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


class ForkRole:
    """One of their roles, as a Group."""

    def __init__(self, workers: ForkWorkers, role: str):
        self.workers, self.role, self.size = workers, role, workers.size

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[_Answer]:
        return self.workers.send(self.role, [(method, tuple(map(arrived, args)), kwargs)] * self.size)

    def map(self, method: str, shards: Any, *args: Any) -> list[_Answer]:
        return self.workers.send(self.role, [(method, tuple(map(arrived, (shard, *args))), {}) for shard in shards])


class ForkGroup(ForkWorkers):
    """Workers that host one role, as a Group."""

    def __init__(self, size: int, target: str, *args: Any, threads: int = 1):
        super().__init__(size, {"role": target}, *args, threads=threads)
        self.call, self.map = self["role"].call, self["role"].map


def _environment() -> dict[str, str]:
    """What the parent of all workers could not know when it started: where the storage is."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MUSTER_"))}


def _serve(
    pipe: Any,
    rank: int,
    size: int,
    threads: int,
    roles: dict[str, str],
    args: tuple,
    environment: dict[str, str],
    key: bytes,
) -> None:
    os.environ.update(environment)
    listener = listen("127.0.0.1") if rank == 0 else None
    if listener is not None:
        pipe.send((0, True, listener.getsockname()[1]))
    rank_info = RankInfo(
        rank=rank, size=size, local_rank=rank, local_size=size, threads=threads, port=pipe.recv(), timeout_s=60
    )
    set_environment(rank_info)
    join(rank_info, key, listener)
    _refuse_pickles()
    worker = Worker(rank_info)
    for role, target in roles.items():
        worker.build(role, target, *args)
    pipe.send((0, True, None))
    while True:
        try:
            number, role, method, call_args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((number, True, worker.call(role, method, *call_args, **kwargs)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((number, False, error))
    leave()


def _refuse_pickles() -> None:
    """Whatever trains in a test, no collective unpickles what other workers send, also none that a library calls."""
    from torch.distributed import distributed_c10d

    def refuse(*_: object) -> None:
        raise AssertionError("a collective of pickled objects")

    distributed_c10d._object_to_tensor = distributed_c10d._tensor_to_object = refuse  # type: ignore[assignment]


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function answers in a process of its own, forked from one that has imported everything."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_answer, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    try:
        return _Answer(ours).result()
    finally:
        process.kill()
        process.join()


def _answer(pipe: Any, function: Callable[..., Any], args: tuple) -> None:
    try:
        pipe.send((0, True, function(*args)))
    except Exception as error:
        traceback.print_exc()
        pipe.send((0, False, error))
