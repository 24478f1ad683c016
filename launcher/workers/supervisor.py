"""Supervises the process of one worker: starts it, watches it from outside, and replaces it quickly when it ends.

Runs in a Ray actor (actor.py) but does not use Ray. The process is forked from a fork server that has imported
everything, so that restarting a worker takes a fork, not the imports. The actor answers even while the worker is busy.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from launcher.process.short_tempdir import SOCKET_PATH, short_tempdir
from launcher.process.subprocesses import module_command, with_own_code
from launcher.workers.errors import WorkerDied
from launcher.workers.fork_server import STACKS
from launcher.workers.ipc import Pipe
from launcher.workers.preemption import Listener
from training.process import heartbeat as pulse
from training.process.memory import TUNABLES

_BIRTH_S = 300.0
"""Longest time for the imports of a fork server, on a machine that starts many at once."""
_STACKS_S = 2.0
AT_HAND = "MUSTER_FORK_SERVER"
"""Environment variable: device and socket of a fork server on this machine."""
_MOST_PARENTS = 128
_RETRIES = 2
"""Of a request whose process was killed: a fork server that is ending may still accept a connection."""
_SOCKET = "fork"
"""Name of its socket."""


@dataclass(frozen=True)
class WorkerHealth:
    """The state of a worker as seen from outside."""

    pulse: pulse.Pulse | None
    """None: it is not running."""
    state: str
    """The kernel's state letter: R running, S sleeping, D waiting for a disk, T stopped, Z dead."""
    memory: float
    """Fraction of the machine's memory that is in use."""
    notice: str | None
    """The cloud's preemption notice for the machine, if there is one."""


class WorkerSupervisor:
    """The supervisor of one worker. `begin` starts its process; `ask` sends requests to it. `device`: cpu or cuda."""

    def __init__(self, device: str):
        self.device = device
        self.fork_server = _ForkServer(device)
        self.notices = Listener()
        self.worker: _Worker | None = None

    def begin(self, log: str, environment: dict[str, str]) -> int:
        """Start a process, after ending the current one. Returns its process id.
        A fork server that has ended is replaced."""
        self.end()
        if self.fork_server.gone.is_set():
            self.fork_server.close()
            self.fork_server = _ForkServer(self.device)
        self.worker = self.fork_server.fork()
        return int(self.worker.ask("begin", log, environment))

    def ask(self, name: str, *args: Any) -> Any:
        """Send a request to the worker (a method of fork_server.WorkerCommands) and return the result.
        Raises Raised, WorkerDied, or a MusterError that it raised."""
        if self.worker is None:
            raise WorkerDied(0, "it was not started")
        return self.worker.ask(name, *args)

    def end(self) -> None:
        """Kill the worker, if there is one. Returns when it is gone."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def health(self) -> WorkerHealth:
        """Return the state of the worker, even while it is busy."""
        import psutil

        memory = psutil.virtual_memory().percent / 100
        if (worker := self.worker) is None or worker.gone.is_set():
            return WorkerHealth(None, "Z", memory, self.notices.said)
        return WorkerHealth(pulse.read(worker.memory), _state(worker.pid), memory, self.notices.said)

    def stacks(self, log: Path) -> str:
        """Return the stack traces that the worker writes to its log; empty if it does not answer."""
        if (worker := self.worker) is None or worker.gone.is_set():
            return ""
        before = log.stat().st_size
        with suppress(ProcessLookupError):
            os.kill(worker.pid, STACKS)
        return _what_is_added(log, before)

    def close(self) -> None:
        self.end()
        self.fork_server.close()


class _Worker:
    """A forked process: its pipe, its heartbeat, and its exit status."""

    def __init__(self, pid: int, pipe: Pipe, memory: mmap.mmap):
        self.pid, self.pipe, self.memory = pid, pipe, memory
        self.gone = threading.Event()
        self.status = 0
        self._end, self._ended = os.pipe()
        self._oom_kills = _oom_kills()

    def ask(self, name: str, *args: Any) -> Any:
        try:
            self.pipe.send((name, args))
            wait([self.pipe, self._end])  # type: ignore[list-item]  # a descriptor may be waited for, too
            if not self.pipe.poll():
                raise EOFError
            ok, value = self.pipe.recv()
        except (EOFError, ConnectionError, OSError):
            raise self._death() from None
        if ok:
            return value
        raise value

    def _death(self) -> WorkerDied:
        self.gone.wait(5)
        return WorkerDied(self.status, short_of_memory=_oom_kills() > self._oom_kills)

    def ended(self, status: int) -> None:
        """Record the exit status that the fork server reports."""
        self.status = status
        self.gone.set()
        os.close(self._ended)

    def kill(self) -> None:
        if not self.gone.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.gone.wait(10)


class _ForkServer:
    """The process that forks workers, and the thread that receives its messages. It uses the fork server of this
    machine if there is one, or starts one."""

    def __init__(self, device: str):
        self.process: subprocess.Popen[bytes] | None = None
        control = _at_hand(device)
        if control is None:
            control, theirs = socket.socketpair()
            self.process = _start_fork_server(theirs, device)
        self.control = control
        self.ready = threading.Event()
        self.started = threading.Event()
        self.gone = threading.Event()
        self.pid = 0
        self.workers: dict[int, _Worker] = {}
        self._gone_early: dict[int, int] = {}
        """Exit statuses of workers that ended before they were registered here."""
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="fork_server", daemon=True).start()

    def fork(self) -> _Worker:
        """Fork a worker. Raises WorkerDied if the fork server is gone."""
        if not self.ready.wait(_BIRTH_S) or self.gone.is_set():
            raise WorkerDied(self._status(), "the fork server failed to start: its imports failed or took too long")
        ours, theirs = socket.socketpair()
        descriptor = os.memfd_create("pulse")
        os.ftruncate(descriptor, pulse.SIZE)
        memory = mmap.mmap(descriptor, pulse.SIZE)
        self.started.clear()
        socket.send_fds(self.control, [b"f"], [theirs.fileno(), descriptor])
        theirs.close()
        os.close(descriptor)
        if not self.started.wait(60) or self.gone.is_set():
            raise WorkerDied(self._status(), "the fork server could not fork a process")
        worker = _Worker(self.pid, Pipe(ours), memory)
        with self._lock:
            self.workers[worker.pid] = worker
            status = self._gone_early.pop(worker.pid, None)
        if status is not None:
            worker.ended(status)
        return worker

    def _status(self) -> int:
        """Return the exit status of the fork server, 0 if it is unknown."""
        return (self.process.poll() if self.process is not None else 0) or 0

    def _listen(self) -> None:
        with self.control.makefile("r") as lines, suppress(OSError):
            for line in lines:
                self._receive(json.loads(line))
        if self.process is not None:
            self.process.wait()
        self.gone.set()
        self.ready.set()
        self.started.set()
        for worker in list(self.workers.values()):  # the kernel kills them with their parent
            worker.ended(-signal.SIGKILL)

    def _receive(self, info: dict[str, Any]) -> None:
        if "ready" in info:
            self.ready.set()
        elif "started" in info:
            self.pid = info["started"]
            self.started.set()
        else:
            with self._lock:
                worker = self.workers.pop(info["gone"], None)
                if worker is None:
                    self._gone_early[info["gone"]] = info["status"]
            if worker is not None:
                worker.ended(info["status"])

    def close(self) -> None:
        with suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.process.kill()


def apart(name: str, *args: Any) -> Any:
    """Run one request (a method of fork_server.WorkerCommands) in a new fork of the fork server of this machine.
    Raises what `WorkerSupervisor.ask` raises.

    If the fork server or its fork was killed, it retries, if necessary with its own fork server; not if the block of
    `fork_server_here` has ended.
    """
    for _ in range(_RETRIES):
        try:
            return _in_a_fork(name, *args)
        except WorkerDied as death:
            if not has_fork_server() or death.status not in (0, -signal.SIGKILL) or death.short_of_memory:
                raise
    return _in_a_fork(name, *args)


def _in_a_fork(name: str, *args: Any) -> Any:
    fork_server = _ForkServer(_device_at_hand())
    try:
        return fork_server.fork().ask(name, *args)
    finally:
        fork_server.close()


def has_fork_server() -> bool:
    """Return whether there is a fork server on this machine."""
    return bool(_device_at_hand())


def _device_at_hand() -> str:
    return os.environ.get(AT_HAND, "").partition(":")[0]


@contextmanager
def fork_server_here(device: str) -> Iterator[None]:
    """Run a fork server for all workers on this machine within the block. Its imports start immediately.

    Supervisors find it through the environment. The workers share its memory, and none has to wait for imports after
    Ray has started.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        folder = stack.enter_context(short_tempdir(SOCKET_PATH - len(_SOCKET) - 1))
        path = f"{folder}/{_SOCKET}"
        listener.bind(path)  # in a folder that is open to us alone
        listener.listen(_MOST_PARENTS)
        ours, theirs = socket.socketpair()
        process = _start_fork_server(theirs, device, listener)
        listener.close()  # or who connects after its end would wait for an answer
        before = os.environ.get(AT_HAND, "")
        os.environ[AT_HAND] = f"{device}:{path}"
        try:
            yield
        finally:
            os.environ[AT_HAND] = before
            ours.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _at_hand(device: str) -> socket.socket | None:
    """Connect to the machine's fork server for a device. Returns None if there is none."""
    its_device, _, path = os.environ.get(AT_HAND, "").partition(":")
    if its_device != device:
        return None
    control = socket.socket(socket.AF_UNIX)
    try:
        control.connect(path)
    except OSError:
        control.close()
        return None
    return control


def _start_fork_server(parent: socket.socket, device: str, *listeners: socket.socket) -> subprocess.Popen[bytes]:
    """Start the process; `parent` is its end of the connection, which is closed here."""
    descriptors = [parent.fileno(), *(listener.fileno() for listener in listeners)]
    command = module_command("launcher.workers.fork_server", str(descriptors[0]), device, *map(str, descriptors[1:]))
    # In a session of its own a Ctrl-C on a terminal is not for it.
    process = subprocess.Popen(
        command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=_environment(device), start_new_session=True
    )
    parent.close()
    return process


def _environment(device: str) -> dict[str, str]:
    # One thread while importing; a worker sets what it computes with when it knows its rank.
    own = with_own_code({**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device})
    if device == "cpu":
        own.setdefault("GLIBC_TUNABLES", TUNABLES)
    return own


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _oom_kills() -> int:
    """Return how many processes the OOM killer has killed since the machine started, in any control group."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _what_is_added(log: Path, before: int) -> str:
    """Return what a process appends to a file, until the file stops growing."""
    deadline, size, still = time.monotonic() + _STACKS_S, before, 0
    while time.monotonic() < deadline and still < 3:
        time.sleep(0.05)
        now = log.stat().st_size
        still = still + 1 if now == size > before else 0
        size = now
    with log.open("rb") as file:
        file.seek(before)
        return file.read().decode(errors="replace")
