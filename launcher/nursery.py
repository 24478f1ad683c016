"""A process that has imported what workers need and forks one in a moment: `python -m launcher.nursery FD DEVICE`.

FD is a Unix socket to the parent. The parent sends a byte with two file descriptors (a connection, the memory of the pulse)
for each worker it wants; the nursery answers with JSON lines: {"ready"}, {"born": pid}, {"gone": pid, "status": code}.
Nobody outlives the other: the nursery ends its workers when the parent is gone, and the kernel ends them with the nursery.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import mmap
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from launcher.pipe import Pipe

STACKS = signal.SIGUSR1
"""Makes a worker write the stacks of its threads to its log."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on a terminal is for the one who drives
    from training import preload

    preload.run(sys.argv[2])
    gc.collect()
    gc.freeze()  # or the first collection in each worker would copy every page that they share
    _tell(parent, ready=True)
    wakeup, woken = socket.socketpair()
    wakeup.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    alive: set[int] = set()
    while True:
        ready, _, _ = select.select([parent, woken], [], [])
        if woken in ready:
            with suppress(BlockingIOError):
                woken.recv(4096)
            _bury(parent, alive)
        if parent in ready:
            request, descriptors, _, _ = socket.recv_fds(parent, 1, 2)
            if not request:
                break
            alive.add(_fork(parent, descriptors, (wakeup, woken)))
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _tell(parent: socket.socket, **facts: Any) -> None:
    with suppress(ConnectionError):
        parent.sendall(json.dumps(facts).encode() + b"\n")


def _bury(parent: socket.socket, alive: set[int]) -> None:
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        alive.discard(pid)
        _tell(parent, gone=pid, status=os.waitstatus_to_exitcode(status))


def _fork(parent: socket.socket, descriptors: list[int], own: tuple[socket.socket, ...]) -> int:
    nursery = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (parent, *own):
            end.close()
        _end_with(nursery)
        _live(*descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    _tell(parent, born=pid)
    return pid


def _end_with(nursery: int) -> None:
    """Have the kernel kill this process when the nursery is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != nursery:
        os._exit(1)


def _live(connection: int, memory: int) -> NoReturn:
    status = 1
    try:
        from training import pulse

        pulse.begin(mmap.mmap(memory, pulse.SIZE))
        _serve(Pipe(socket.socket(fileno=connection)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the nursery's exit handlers are not ours


def _serve(connection: Pipe) -> None:
    """Do what is asked until nobody is there to ask. Each request is (function name of `Life`, arguments)."""
    life = Life()
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(life, name)(*args), "")
        except Exception as error:
            answer = (False, error, traceback.format_exc())
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
            unsent = RuntimeError(f"{type(answer[1]).__name__} cannot be sent: {error}")
            connection.send((False, unsent, answer[2]))


class Life:
    """What a worker can be asked."""

    def begin(self, log: str, environment: dict[str, str]) -> int:
        """Write to `log` from now on. Answers with the pid."""
        os.environ.update(environment)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable(all_threads=True)
        faulthandler.register(STACKS, all_threads=True)
        return os.getpid()

    def listen(self, host: str) -> int:
        from training.distributed import listen

        self.listener = listen(host)
        return self.listener.getsockname()[1]

    def join(self, seat: Any, visible_gpus: str | None) -> None:
        from training.distributed import join, set_environment
        from training.group import Worker

        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        set_environment(seat)
        join(seat, getattr(self, "listener", None))
        self.worker = Worker(seat)

    def build(self, role: str, target: str, args: tuple) -> None:
        self.worker.build(role, target, *args)

    def call(self, role: str, method: str, args: tuple, kwargs: dict) -> Any:
        return self.worker.call(role, method, *args, **kwargs)


if __name__ == "__main__":
    main()
