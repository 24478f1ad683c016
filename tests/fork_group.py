"""Workers for tests: processes forked from one that has imported everything, driven as a Group. A third of a second a group."""

from __future__ import annotations

import multiprocessing
import traceback
from typing import Any

from training.distributed import Seat, join, leave, listen, set_environment
from training.group import Worker

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])
_TIMEOUT_S = 120


class _Answer:
    def __init__(self, pipe: Any):
        self.pipe = pipe

    def result(self, timeout_s: float | None = None) -> Any:
        if not self.pipe.poll(_TIMEOUT_S):
            raise TimeoutError("a test worker did not answer")
        ok, value = self.pipe.recv()
        if not ok:
            raise value
        return value


class ForkGroup:
    """`size` workers that host one role. Use as a context manager."""

    def __init__(self, size: int, target: str, *args: Any, threads: int = 1):
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, rank, size, threads, target, args), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        port = _Answer(self.pipes[0]).result()
        for pipe in self.pipes:
            pipe.send(port)
        for pipe in self.pipes:
            _Answer(pipe).result()

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[_Answer]:
        for pipe in self.pipes:
            pipe.send((method, args, kwargs))
        return [_Answer(pipe) for pipe in self.pipes]

    def map(self, method: str, shards: Any, *args: Any) -> list[_Answer]:
        for pipe, shard in zip(self.pipes, shards, strict=True):
            pipe.send((method, (shard, *args), {}))
        return [_Answer(pipe) for pipe in self.pipes]

    def __enter__(self) -> ForkGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, size: int, threads: int, target: str, args: tuple) -> None:
    listener = listen("127.0.0.1") if rank == 0 else None
    if listener is not None:
        pipe.send((True, listener.getsockname()[1]))
    seat = Seat(rank=rank, size=size, local_rank=rank, local_size=size, threads=threads, port=pipe.recv(), timeout_s=60)
    set_environment(seat)
    join(seat, listener)
    worker = Worker(seat)
    worker.build("role", target, *args)
    pipe.send((True, None))
    while True:
        try:
            method, call_args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, worker.call("role", method, *call_args, **kwargs)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, error))
    leave()
