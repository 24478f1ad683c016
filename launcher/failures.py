"""What went wrong -> what to say of it. Pure: knows evidence, never Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.errors import MusterError, TrainingError

_TAIL_LINES = 15
_ORDER = ("died", "raised", "failed")
# What a healthy worker says when another one is gone.
_COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo",
    "NCCL",
    "Broken pipe",
    "Connection refused",
)


class WorkerError(TrainingError):
    """One worker failed: which one, how (died, raised, failed), what it said, and where its log is."""

    def __init__(self, rank: int, how: str, message: str, log: Path, trace: str = "", collateral: Sequence[int] = ()):
        super().__init__(message)
        self.args = (rank, how, message, log, trace, collateral)
        self.rank, self.how, self.log, self.trace, self.collateral = rank, how, log, trace, tuple(collateral)

    def __str__(self) -> str:
        lines = [f"worker {self.rank} {self.how}: {self.message}"]
        if self.collateral:
            lines.append(f"workers {', '.join(map(str, self.collateral))} failed because of it")
        if self.trace:
            lines += ["its traceback ends with:", *_last_lines(self.trace)]
        elif tail := _tail(self.log):
            lines += ["the end of its log:", *tail]
        return "\n".join([*lines, f"whole log: {self.log}"])


def first_cause(failures: Sequence[WorkerError | MusterError]) -> Exception:
    """The failure that the others follow from; it names the others as collateral."""
    cause = min(failures, key=_how_likely_collateral)
    if isinstance(cause, WorkerError):
        others = sorted(f.rank for f in failures if isinstance(f, WorkerError) and f is not cause)
        return WorkerError(cause.rank, cause.how, cause.message, cause.log, cause.trace, others)
    return cause


def _how_likely_collateral(failure: WorkerError | MusterError) -> tuple[int, int, int]:
    if not isinstance(failure, WorkerError):
        return (-1, 0, 0)
    complains_of_others = failure.how == "raised" and any(word in failure.message for word in _COLLATERAL)
    return (int(complains_of_others), _ORDER.index(failure.how), failure.rank)


def _last_lines(text: str) -> list[str]:
    return [f"  {line}" for line in text.rstrip().splitlines()[-_TAIL_LINES:]]


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            return _last_lines(file.read().decode(errors="replace"))
    except OSError:
        return []
