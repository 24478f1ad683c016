"""Shuts a machine down whose cluster's head is gone: a machine for workers
that nobody uses any more would cost money until somebody looks.

A program of its own for the machines of a cloud, where it lies alone beside whatever Python there is (3.8 or newer): it
imports nothing of Muster and no package. Ray's raylet ends by itself when the head's GCS is silent for a minute; the
machine does not, and the autoscaler that would end it was on the head.

    python3 orphan_watch.py HEAD:PORT --minutes 15 -- COMMAND ...

COMMAND is run when the head has not answered for so long. There is no default: what ends a
machine is for the caller to say.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import socket
import subprocess
import sys
import time
from typing import Callable, Sequence  # noqa: UP035  (Python 3.8)

EVERY_S, TIMEOUT_S = 15.0, 30.0
_LOCK = "~/.muster/orphan_watch.lock"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What a client of HTTP/2 begins with: the preface and an empty SETTINGS frame (RFC 9113, 3.4)."""
_FRAME_HEADER, _TYPE, _SETTINGS = 9, 3, 4
"""Bytes of a frame's header, where in it the type stands, and the type that a server begins with."""


def answers(host: str, port: int, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a gRPC server, as Ray's GCS is one, answers at this address.

    An accepted connection does not show it: the kernel accepts for a process that hangs,
    and another machine may have the address now.
    """
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            connection.sendall(_HELLO)
            header = b""
            while len(header) < _FRAME_HEADER:
                part = connection.recv(_FRAME_HEADER - len(header))
                if not part:
                    return False
                header += part
            return header[_TYPE] == _SETTINGS
    except OSError:
        return False


def silence(before_s: float, round_s: float, seen: bool, longest_round_s: float) -> float:
    """Seconds since the head was last seen, after one more look that came `round_s` after the one before.

    A round longer than a look can take was a pause of this machine or this process: it says nothing about the head.
    """
    return 0.0 if seen else before_s + min(round_s, longest_round_s)


def watch(look: Callable[[], bool], end: Callable[[], bool], limit_s: float, every_s: float, timeout_s: float) -> None:
    """Look at the head for ever, and end the machine whenever nothing was seen of it for `limit_s`;
    a failed end is tried again."""
    silent_s, before = 0.0, time.monotonic()
    while True:
        time.sleep(every_s)
        seen, now = look(), time.monotonic()
        silent_s, before = silence(silent_s, now - before, seen, every_s + timeout_s), now
        if silent_s >= limit_s and end():
            silent_s = 0.0  # if the machine is still there after as long again, it is ended again


def _end(head: str, minutes: float, command: Sequence[str]) -> bool:
    _log(f"the head {head} did not answer for {minutes:g} minutes; this machine ends itself: {shlex.join(command)}")
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        _log(f"this machine did not end: {error}; trying again")
        return False
    if status:
        _log(f"this machine did not end: exit status {status}; trying again")
    return status == 0


def _log(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _is_first(path: str) -> bool:
    """Whether no other process of this user watches already. The lock lasts as long as this process."""
    path = os.path.expanduser(path)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a command when the head of a Ray cluster is gone.")
    parser.add_argument("head", help="HOST:PORT of its GCS")
    parser.add_argument("--minutes", type=float, required=True, help="how long it may be silent")
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between looks")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds that it may take to answer")
    parser.add_argument("--lock", default=_LOCK, help="file that keeps a second one from watching")
    parser.add_argument("command", nargs="+", help="what ends the machine")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    given = _arguments(words)
    host, _, port = given.head.rpartition(":")
    if not _is_first(given.lock):
        return 0
    _log(f"watching the head {given.head}")
    watch(
        lambda: answers(host, int(port), given.timeout),
        lambda: _end(given.head, given.minutes, given.command),
        60 * given.minutes, given.every, given.timeout,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
