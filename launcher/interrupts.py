"""What Ctrl-C, SIGTERM and a closed terminal mean while a job runs."""

from __future__ import annotations

import os
import signal
from types import FrameType


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
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.getsignal(number) for number in numbers}
        self.take()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Be the one who is told of signals. Once more after Ray was started, which takes SIGTERM for itself."""
        for number in self.before:
            signal.signal(number, self._received)

    def end(self) -> None:
        """From here on there is only tidying up."""
        self._ending = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._ending or (self.requested and not self.training):
            return
        if not self.training or (self.requested and number == signal.SIGINT):
            self._ending, self.number = True, number
            raise KeyboardInterrupt
        if not self.requested:
            # Not by print: the main thread may be in the middle of one, and that cannot be entered twice.
            os.write(2, b"\nstopping: the step in hand is finished and saved; Ctrl-C again to stop at once\n")
        self.requested, self.number = True, number
