"""What Ctrl-C and SIGTERM mean while a job runs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Interrupts:
    """What Ctrl-C and SIGTERM do for the length of a `with` block.

    While a phase trains, the first asks for an orderly end and a second Ctrl-C ends at once; at other times the first
    does, since there is nothing to save. Once the end has begun, nothing interrupts the tidying up.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.requested = False
        self.training = False
        self._ending = False

    def __enter__(self) -> Interrupts:
        self.before = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            return
        if not self.training or (self.requested and number == signal.SIGINT):
            self._ending = True
            raise KeyboardInterrupt
        if not self.requested:
            self.say("stopping: the step in hand is finished and saved; Ctrl-C again to stop at once")
        self.requested = True
