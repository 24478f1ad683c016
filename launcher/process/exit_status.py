"""Exit statuses of every command, and what each means."""

from __future__ import annotations

import signal

DONE, FAILED, INPUT_WRONG, LIMIT_REACHED, RESUME_ME, INTERRUPTED = 0, 1, 2, 3, 75, 130
EXIT_STATUSES = {
    DONE: "Done.",
    FAILED: "Failed. Of verbs that look at something: it is not well (a damaged checkpoint, a plan that cannot fit).",
    INPUT_WRONG: "The input is wrong: the command, the job, the data, or what the run folder holds.",
    LIMIT_REACHED: "Saved and stopped at `max_hours` or `max_cost`; resume it with a higher one.",
    RESUME_ME: "Nothing is wrong with the job: a SIGTERM or a closed terminal has stopped it, its machines did not come, or Ray did not "
    "start again; resume it.",
    INTERRUPTED: "Interrupted by a person (Ctrl-C, or `muster stop`); resume it.",
}
"""RESUME_ME is EX_TEMPFAIL of sysexits.h."""


def after_signal(number: int) -> int:
    """The exit status of a command that a signal has stopped.

    SIGTERM is how schedulers take machines back: the one who sent it may want to start the command again elsewhere.
    """
    return INTERRUPTED if number == signal.SIGINT else RESUME_ME
