"""Runs one command to its end or its time limit, notes when each line came, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

_GRACE_S = 15.0
"""How long a process that was asked to stop may take before it is killed."""
_TAIL = 100


@dataclass(frozen=True)
class Line:
    """One line of output and when it came, in seconds since the command was given."""

    at: float
    text: str


@dataclass
class Finished:
    """A command that came to its end."""

    began: float
    """Wall clock, as `time.time()`."""
    seconds: float
    lines: list[Line] = field(default_factory=list)


class CommandFailed(RuntimeError):
    """A command that ended with an error or did not end in time. Carries the last lines of its output."""


def run(
    command: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str],
    timeout_s: float,
    on_line: Callable[[Line], None] = lambda line: None,
) -> Finished:
    """Run `command` in `folder` with `env` laid over the environment. `on_line` sees each line as it comes. Raises CommandFailed."""
    began, clock = time.time(), time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[Line] = []
    reader = threading.Thread(target=_read, args=(process.stdout, lines, clock, on_line), daemon=True)
    reader.start()
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise CommandFailed(_report(command, f"did not end within {timeout_s:.0f} s", lines)) from None
    finally:
        _end(process)
        reader.join(_GRACE_S)
    if status != 0:
        raise CommandFailed(_report(command, f"ended with status {status}", lines))
    return Finished(began, time.monotonic() - clock, lines)


def _read(output: IO[str], lines: list[Line], clock: float, on_line: Callable[[Line], None]) -> None:
    for text in output:
        lines.append(Line(time.monotonic() - clock, text.rstrip("\n")))
        on_line(lines[-1])


def _report(command: Sequence[str], what: str, lines: Sequence[Line]) -> str:
    return "\n".join([f"{' '.join(command)} {what}; its last lines:", *(line.text for line in lines[-_TAIL:])])


def _end(process: subprocess.Popen) -> None:
    """End the command and all that it started; a command that is through has only its process group left to end."""
    family = _descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()  # psutil knows the member by its start time too: a pid that was given anew is left alone
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
