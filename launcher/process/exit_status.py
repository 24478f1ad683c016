"""The exit statuses of all commands."""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitStatus(IntEnum):
    """How a command ended. The docstring of each member is what the reference page says of it."""

    DONE = 0, "The command succeeded. With `muster run --only PHASE`, that phase is finished."
    FAILED = (
        1,
        (
            "The command or its job failed. For commands that inspect something, a check failed: a checkpoint is "
            "damaged, or a job does not fit into memory."
        ),
    )
    INVALID_INPUT = (
        2,
        "The input is invalid: the command line, the job file, the data or the contents of the run folder.",
    )
    LIMIT_REACHED = (
        3,
        "The run saved a checkpoint and stopped at `max_hours` or `max_cost`. Resume it with a higher limit.",
    )
    TRY_AGAIN = (
        75,
        (
            "The job itself is fine: SIGTERM or a closed terminal stopped it, its machines were not available, or Ray "
            "did not start again. Resume it. (75 is EX_TEMPFAIL of sysexits.h.)"
        ),
    )
    INTERRUPTED = 130, "A user interrupted the command with Ctrl-C or `muster stop`. Resume the run to continue it."

    def __new__(cls, value: int, meaning: str) -> ExitStatus:
        member = int.__new__(cls, value)
        member._value_ = value
        member.__doc__ = meaning
        return member


def after_signal(number: int) -> ExitStatus:
    """The exit status of a command that a signal has stopped.

    SIGTERM is how schedulers take machines back: the one who sent it may want to start the command again elsewhere.
    """
    return ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.TRY_AGAIN
