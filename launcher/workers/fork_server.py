"""A process that has imported what workers need and forks them quickly:
`python -m launcher.workers.fork_server FD DEVICE [FD]`.

The first FD is a Unix socket to the parent, the second a listening socket: each connection is another parent. A parent
sends a byte with two file descriptors (a connection, the memory of the pulse) for each worker it wants; the fork server
answers with JSON lines: {"ready"}, {"started": pid}, {"gone": pid, "status": code}. The fork server ends the workers of
a parent that is gone, and exits when the first parent is gone; the kernel ends the workers with the fork server.
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
from pathlib import Path
from typing import Any, NoReturn

from launcher.process.output import Output
from launcher.workers.errors import Raised
from launcher.workers.exception_kinds import evidence_of
from launcher.workers.ipc import Pipe

STACKS = signal.SIGUSR1
"""The signal that makes a worker write the stack traces of its threads to its log."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    first = socket.socket(fileno=int(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[3])) if len(sys.argv) > 3 else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on a terminal is for the one who drives
    from training.process import preload

    preload.run(sys.argv[2])
    gc.collect()
    gc.freeze()  # or the first collection in each worker would copy every page that they share
    _tell(first, ready=True)
    wakeup, woken = socket.socketpair()
    wakeup.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    fork_server = _ForkServer(first, listener, (wakeup, woken))
    while first in fork_server.parents:
        ready, _, _ = select.select(
            [woken, *fork_server.parents, *([listener] if listener is not None else [])], [], []
        )
        if woken in ready:
            with suppress(BlockingIOError):
                woken.recv(4096)
            fork_server.reap()
        if listener in ready and listener is not None:
            fork_server.accept(listener.accept()[0])
        for parent in fork_server.parents & set(ready):
            fork_server.answer(parent)
    fork_server.end()


def _tell(parent: socket.socket, **fields: Any) -> None:
    with suppress(OSError):
        parent.sendall(json.dumps(fields).encode() + b"\n")


class _ForkServer:
    """The parents that request workers, and the workers of each."""

    def __init__(self, first: socket.socket, listener: socket.socket | None, own: tuple[socket.socket, ...]):
        self.parents = {first}
        self.own = (*own, *([listener] if listener is not None else []))
        """Sockets that a worker must close."""
        self.parent_of: dict[int, socket.socket] = {}
        """The parent of each running worker, by process id."""

    def accept(self, parent: socket.socket) -> None:
        """Add a parent."""
        self.parents.add(parent)
        _tell(parent, ready=True)

    def answer(self, parent: socket.socket) -> None:
        """Handle a request of a parent, or end its workers if it is gone."""
        try:
            request, descriptors, _, _ = socket.recv_fds(parent, 1, 2)
        except OSError:
            request = b""
        if request:
            self._fork(parent, descriptors)
            return
        self.parents.discard(parent)
        parent.close()
        for pid in [pid for pid, its in self.parent_of.items() if its is parent]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Report workers that have ended to their parents."""
        while self.parent_of:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _tell(self.parent_of.pop(pid), gone=pid, status=os.waitstatus_to_exitcode(status))

    def end(self) -> None:
        """End all workers, and wait until they have released their resources."""
        for pid in self.parent_of:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.parent_of:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _fork(self, parent: socket.socket, descriptors: list[int]) -> None:
        fork_server = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (*self.parents, *self.own):
                end.close()
            _end_with(fork_server)
            _live(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self.parent_of[pid] = parent
        _tell(parent, started=pid)


def _end_with(fork_server: int) -> None:
    """Make the kernel kill this process when the fork server ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != fork_server:
        os._exit(1)


def _live(connection: int, memory: int) -> NoReturn:
    status = 1
    try:
        from training.process import heartbeat

        heartbeat.begin(mmap.mmap(memory, heartbeat.SIZE))
        _serve(Pipe(socket.socket(fileno=connection)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the fork server's exit handlers are not ours


def _serve(connection: Pipe) -> None:
    """Serve requests until the connection closes. Each request is (method name of `WorkerCommands`, arguments)."""
    commands = WorkerCommands()
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(commands, name)(*args))
        except Exception as error:
            answer = (False, evidence_of(error, traceback.format_exc()))
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
            unsent = Raised("RuntimeError", f"{type(answer[1]).__name__} cannot be sent: {error}", "")
            connection.send((False, unsent))


class WorkerCommands:
    """The requests that a worker serves."""

    def prepare(self, phase: Any, cache: str, environment: dict[str, str]) -> tuple[str, list[str]]:
        """Tokenize the data of a phase. Returns the folder of the training samples, and what was wrong with data that
        had to be rebuilt.
        Raises what prepare_phase raises."""
        os.environ.update(environment)
        from training.data.phase_data import prepare_phase

        stores, _ = prepare_phase(phase, Path(cache))
        return str(stores.train.folder), stores.damage

    def examine(self, model: Any, environment: dict[str, str], limit_s: int) -> None:
        """Find out what a model's code can do (training/models/probe.py).
        Raises InputError for one that cannot be loaded."""
        os.environ.update(environment)
        signal.alarm(limit_s)
        from training.models.probe import traits_for

        traits_for(model)

    def begin(self, log: str, environment: dict[str, str]) -> int:
        """Redirect the output to `log`. Returns the process id."""
        os.environ.update(environment)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file always
        faulthandler.enable(all_threads=True)
        faulthandler.register(STACKS, all_threads=True)
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)  # the disk of the log may be full
        return os.getpid()

    def listen(self, host: str) -> int:
        from training.process.distributed import listen

        self.listener = listen(host)
        return int(self.listener.getsockname()[1])

    def join(self, rank_info: Any, key: bytes, visible_gpus: str | None) -> None:
        from training.group import Worker
        from training.process.distributed import join, set_environment

        if visible_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
        set_environment(rank_info)
        join(rank_info, key, getattr(self, "listener", None))
        self.worker = Worker(rank_info)

    def build(self, role: str, target: str, args: tuple[Any, ...]) -> None:
        self.worker.build(role, target, *args)

    def call(self, role: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.worker.call(role, method, *args, **kwargs)


if __name__ == "__main__":
    main()
