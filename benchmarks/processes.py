"""Runs one command to its end or its time limit, notes when each line came and what memory it took,
and leaves no process behind."""

from __future__ import annotations

import os
import re
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
_LOOK_S = 1.0
"""Between two looks at the memory; one takes about 10 ms a GiB."""


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
    peak_gib: float = 0.0
    """The most memory that the command and its descendants had together at one look;
    0 if nobody looked or there is no /proc."""


class CommandFailed(RuntimeError):
    """A command that ended with an error or did not end in time. Carries the last lines of its output."""


def run(
    command: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str],
    timeout_s: float,
    on_line: Callable[[Line], None] = lambda line: None,
    watch_memory: bool = False,
) -> Finished:
    """Run `command` in `folder` with `env` laid over the environment.
    `on_line` sees each line as it comes. Raises CommandFailed."""
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
    looks, ended = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, looks, ended), daemon=True)
    if watch_memory:
        watcher.start()
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise CommandFailed(_report(command, f"did not end within {timeout_s:.0f} s", lines)) from None
    finally:
        ended.set()
        end(process)
        reader.join(_GRACE_S)
    if status != 0:
        raise CommandFailed(_report(command, f"ended with status {status}", lines))
    return Finished(began, time.monotonic() - clock, lines, max(looks))


def _read(output: IO[str], lines: list[Line], clock: float, on_line: Callable[[Line], None]) -> None:
    for text in output:
        lines.append(Line(time.monotonic() - clock, text.rstrip("\n")))
        on_line(lines[-1])


def _watch(pid: int, looks: list[float], ended: threading.Event) -> None:
    while not ended.wait(_LOOK_S):
        looks.append(sum(map(_pss_gib, [pid, *(member.pid for member in descendants(pid))])))


def _pss_gib(pid: int) -> float:
    """What a process has resident, a page that n processes share counted as 1/n of it."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0  # it has ended, or this is no Linux
    found = re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def _report(command: Sequence[str], what: str, lines: Sequence[Line]) -> str:
    return "\n".join([f"{' '.join(command)} {what}; its last lines:", *(line.text for line in lines[-_TAIL:])])


def end(process: subprocess.Popen[str]) -> None:
    """End the command and all that it started; a command that is through has only its process group left to end."""
    family = descendants(process.pid)
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


def descendants(pid: int) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return children
    except psutil.NoSuchProcess:
        return []
