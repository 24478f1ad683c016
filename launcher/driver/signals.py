"""What Ctrl-C, SIGTERM and a closed terminal mean: for every command from its first moment on, and while a job runs."""

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
    """The exit status of this command, which a KeyboardInterrupt has ended."""
    return after_signal(_last)


def exit_on_signals() -> None:
    """From here on signals end this process at once, with the status that says so.
    For the time when nothing is begun yet."""
    _handle(lambda number, frame: os._exit(after_signal(number)))


@contextmanager
def raised() -> Iterator[None]:
    """In the block every signal that asks for the end raises KeyboardInterrupt."""
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
    """Have signals handled; not a hang-up if whoever started us wants that ignored (nohup).
    Returns the handlers before."""
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
    """What Ctrl-C, SIGTERM and SIGHUP do for the length of a `with` block.

    While a phase trains, the first asks for an orderly end and a second Ctrl-C ends at once; at other times the first
    does, since there is nothing to save. Once the end has begun, nothing interrupts the tidying up.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = 0
        """The signal that asked."""
        self.training = False
        self._ending = False

    def __enter__(self) -> Interrupts:
        self._before = _handle(self._received)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """From here on there is only tidying up."""
        self._ending = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._ending or (self.requested and not self.training):
            return
        if not self.training or (self.requested and number == signal.SIGINT):
            self._ending, self.number = True, number
            _raise(number, frame)
        if not self.requested:
            # Not by print: the main thread may be in the middle of one, and that cannot be entered twice.
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping: the step in hand is finished and saved; Ctrl-C again to stop at once\n")
        self.requested, self.number = True, number
