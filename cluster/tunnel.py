"""A way to a port that another machine sees, which no other user of this machine can take over.

ssh listens on a Unix socket in a folder that is its owner's alone, not on a port: everybody can read a port number in
the list of processes and listen on it first. The port that clients are given is held by this process from before
anybody knows it, to the end.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import ClusterError, Refused
from cluster.remote_shell import Login

_UP_S = 30.0
_LISTENING = "0A"
"""The kernel's TCP_LISTEN."""
_LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")
"""127.0.0.1 as it stands in /proc/net/tcp and /proc/net/tcp6."""
_LONGEST_FOLDER = 90
"""Bytes: the path of a Unix socket must fit in 107."""


@contextmanager
def tunnel(host: str, login: Login, address: str, port: int) -> Iterator[int]:
    """For the length of the block a port of this machine's loopback that leads to a port that `host` sees."""
    folder = _private_folder()
    path = f"{folder}/ssh"
    forward = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{path}:{address}:{port}"]
    process = subprocess.Popen(
        [*login.command(), *forward, login.at(host)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _await(path, process, host)
        with _relay(path) as here:
            yield here
    finally:
        process.terminate()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def refuse_strangers_port(port: int, shown: str) -> None:
    """Raises Refused if another user listens on a port of loopback, who would be given the token.
    Sees it where there is /proc."""
    found = [(address, uid) for address, at, uid in _listeners() if at == port]
    # A connection goes to who listens on the address itself before those who listen on all of them.
    own_address = [uid for address, uid in found if address in _LOOPBACK]
    answering = own_address or [uid for address, uid in found if not address.strip("0")]
    if others := set(answering) - {os.getuid()}:
        raise Refused(
            f"another user (uid {min(others)}) listens on port {port} of this machine in place of {shown}; check "
            "that it is still running"
        )


def _listeners() -> Iterator[tuple[str, int, int]]:
    """Address as the kernel writes it, port and user of every TCP socket of this machine that listens."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].rpartition(":")
                if fields[3] == _LISTENING:
                    yield address, int(port, 16), int(fields[7])


def _private_folder() -> str:
    """Made by mkdtemp: mode 700, and it was not there before."""
    folder = tempfile.mkdtemp(prefix="muster-")
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="muster-", dir="/tmp")


def _await(path: str, process: subprocess.Popen[str], host: str) -> None:
    deadline = time.monotonic() + _UP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            assert process.stderr is not None
            raise ClusterError(f"no SSH tunnel to {host}: {process.stderr.read().strip()}")
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
            return
        time.sleep(0.05)
    raise ClusterError(f"no SSH tunnel to {host} within {_UP_S:.0f} s")


@contextmanager
def _relay(path: str) -> Iterator[int]:
    """A port of loopback whose connections are continued on a Unix socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, path), name="tunnel", daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with suppress(OSError):  # wakes up the thread
                listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, path: str) -> None:
    with suppress(OSError):  # it is closed
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_continue, args=(client, path), daemon=True).start()


def _continue(client: socket.socket, path: str) -> None:
    with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
        server.connect(path)
        back = threading.Thread(target=_pump, args=(server, client), daemon=True)
        back.start()
        _pump(client, server)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes until its end, and then that."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
