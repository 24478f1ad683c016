"""Handles Ctrl-C, SIGTERM and SIGHUP (a closed terminal) for every command from its start, and while a job runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from launcher.process.exit_status import after_signal

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_last = signal.SIGINT
"""The signal that came last. Libraries raise a KeyboardInterrupt of their own in place of what a handler has raised."""


def status() -> int:
    """Return the exit status of a command that a KeyboardInterrupt ended."""
    return after_signal(_last)


def exit_on_signals() -> None:
    """Make signals end this process immediately, with the exit status of the signal.
    For the time before anything has started."""
    _handle(lambda number, frame: os._exit(after_signal(number)))


@contextmanager
def raised() -> Iterator[None]:
    """Make every signal that requests the end raise KeyboardInterrupt within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _remember(signal.SIGINT)
    before = _handle(_raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Install a handler for all signals, except SIGHUP if it is ignored already (nohup).
    Returns the previous handlers."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _NUMBERS if number != signal.SIGHUP or not ignores_hangup]
    return {number: signal.signal(number, handler) for number in numbers}


def _raise(number: int, frame: FrameType | None) -> None:
    _remember(number)
    raise KeyboardInterrupt


def _remember(number: int) -> None:
    global _last
    _last = signal.Signals(number)


class Interrupts:
    """Handles Ctrl-C, SIGTERM and SIGHUP within a `with` block.

    While a phase trains, the first signal requests a graceful stop, and a second Ctrl-C stops immediately. At other
    times the first one stops immediately, since there is nothing to save. The final cleanup is not interrupted.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = 0
        """The signal that requested the stop."""
        self.training = False
        self._ending = False

    def __enter__(self) -> Interrupts:
        self._before = _handle(self._received)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Ignore signals from now on, since only cleanup is left."""
        self._ending = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._ending or (self.requested and not self.training):
            return
        if not self.training or (self.requested and number == signal.SIGINT):
            # Python drops an exception that is raised in a destructor or a callback of the import system: then the
            # request is met like one that comes during training.
            self._ending, self.requested, self.number = True, True, number
            _raise(number, frame)
        if not self.requested:
            # Not by print: the main thread may be in the middle of one, and that cannot be entered twice.
            with suppress(OSError):  # the terminal may be gone
                os.write(
                    2,
                    b"\nstopping once the current step is saved; press Ctrl-C again to stop immediately\n",
                )
        self.requested, self.number = True, number
