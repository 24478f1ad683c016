"""Runs commands on a machine: this one, or a remote one through SSH. Scripts are bash; secrets go through standard
input."""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cluster.errors import ClusterError

Answer = TypeVar("Answer")
_AT_ONCE = 16
_SHOWN_LINES = 15
_SSH_FAILED = 255
"""Exit status of ssh if ssh itself failed."""


@dataclass(frozen=True)
class Machine:
    """A machine, by the command that runs `bash -c SCRIPT` on it."""

    name: str
    prefix: tuple[str, ...] = ()
    """Of the command; empty for this machine."""

    def run(self, script: str, *, given: str = "", timeout_s: float = 60.0) -> str:
        """What a script prints; `given` is its standard input. Raises ClusterError if it fails or takes too long."""
        command = ["bash", "-c", script]
        if self.prefix:
            command = [*self.prefix, shlex.join(["bash", "-lc", script])]
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{self.name} did not answer within {timeout_s:.0f} s") from None
        except FileNotFoundError:
            raise ClusterError(f"the command {command[0]} is not installed on this machine; install it") from None
        if done.returncode:
            said = "\n  ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-_SHOWN_LINES:])
            what = "cannot be reached" if self.prefix and done.returncode == _SSH_FAILED else "failed"
            raise ClusterError(f"{self.name} {what}: {said or f'exit status {done.returncode}'}")
        return done.stdout


HERE = Machine("this machine")


@dataclass(frozen=True)
class Login:
    """How ssh gets in. What is not given it decides for itself."""

    user: str | None = None
    port: int | None = None
    key: str | None = None
    """File of the private key."""
    options: Sequence[str] = ()
    """For `ssh -o`."""

    def command(self) -> list[str]:
        """ssh without its destination. It asks no question: keys and known hosts are its own business."""
        always = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4")
        command = ["ssh", "-T", *(part for option in (*always, *self.options) for part in ("-o", option))]
        command += ["-p", str(self.port)] if self.port is not None else []
        return [*command, *(["-i", self.key] if self.key is not None else [])]

    def at(self, host: str) -> str:
        return f"{self.user}@{host}" if self.user else host


def over_ssh(host: str, login: Login) -> Machine:
    return Machine(host, (*login.command(), login.at(host)))


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def on_all(calls: Mapping[str, Callable[[], Answer]]) -> dict[str, Answer | ClusterError]:
    """What many machines answer, asked at the same time; of those in trouble their error."""

    def answer(call: Callable[[], Answer]) -> Answer | ClusterError:
        try:
            return call()
        except ClusterError as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return dict(zip(calls, threads.map(answer, calls.values()), strict=True))


def all_of(answers: Mapping[str, Answer | ClusterError]) -> dict[str, Answer]:
    """The answers. Raises ClusterError with every error among them."""
    errors = [str(answer) for answer in answers.values() if isinstance(answer, ClusterError)]
    if errors:
        raise ClusterError("\n".join(dict.fromkeys(errors)))
    return {name: answer for name, answer in answers.items() if not isinstance(answer, ClusterError)}
