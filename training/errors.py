"""The exceptions that a person sees; every one crosses a process boundary unchanged.

MusterError
├── InputError      the job, its data or a folder is wrong; nothing was started            exit status 2
│   └── (holds Problems, one a line, all that were found)
└── TrainingError   a worker or the training itself failed                                 exit status 1
    ├── SaveError       a checkpoint could not be written; tried again once
    ├── Diverged        the loss is no number any more
    ├── StorageError    a bucket did not answer for as long as we had patience
    ├── ServiceError    likewise another service that the job names
    └── Superseded      a later attempt works on this run; this one must not write any more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (`job.yaml:14`), what (`phases.sft.batch`, may be empty) and the message."""

    where: str
    what: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.what, self.message) if part)


class MusterError(Exception):
    """Base of all errors that are shown as text, without a stack trace."""


class InputError(MusterError):
    """What the user gave cannot work. Holds every problem that was found, not the first alone."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__(problems)
        self.problems = list(problems)

    @classmethod
    def of(cls, where: str, message: str, what: str = "") -> Self:
        return cls([Problem(where, what, message)])

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class TrainingError(MusterError):
    """The training stopped on its own: a failed worker, a loss that is not a number, a full disk."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class SaveError(TrainingError):
    """A checkpoint could not be written. The training itself is well and may try again."""


class Diverged(TrainingError):
    """The loss or the gradient of a step is not a finite number, or the loss is above the limit."""

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.args = (message, step)
        self.step = step


class StorageError(TrainingError):
    """Object storage did not answer, again and again."""


class ServiceError(TrainingError):
    """A service that the job names, such as the endpoint of a reward, did not answer, again and again. It may later."""


class Superseded(TrainingError):
    """A later attempt has taken the run over: nothing of this one may be committed any more."""
