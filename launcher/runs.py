"""The run folder: what a run was asked, what happened, what came of it.

runs/NAME/job.yaml, events.jsonl, PHASE/{metrics.jsonl, tensorboard/, checkpoints/, model/, logs/attempt-1/rank-0.log}
One process works on a run at a time; a lock says which.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from launcher import job as jobs
from launcher.job import Job
from training.checkpoint import CheckpointError
from training.checkpoints import Checkpoints
from training.errors import InputError
from training.storage import place

RUNS = Path("runs")
"""Where runs are looked for when a name alone is given."""
JOB, EVENTS, METRICS, LOCK = "job.yaml", "events.jsonl", "metrics.jsonl", ".lock"


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file that is perhaps being written: rows that were cut short are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


class RunFolder:
    """A run's folder, to look at. `begin` opens one to work on."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    def job(self) -> Job:
        """The job as it was resolved when the run began. Raises InputError if this is no run folder."""
        if not (self.folder / JOB).exists():
            raise InputError.of(str(self.folder), "not a run folder (there is no job.yaml in it)")
        return jobs.read(self.folder / JOB)

    def job_here(self, overrides: Sequence[str] = ()) -> Job:
        """The job to go on with, in the folder where it lies now. Raises InputError for overrides that would move it."""
        moved = [override for override in overrides if override.partition("=")[0] in ("name", "storage")]
        if moved:
            raise InputError.of(
                "command line", "a run keeps its folder; `muster run` with another name begins a new one", moved[0]
            )
        here = self.folder.resolve()
        return replace(jobs.load(self.folder / JOB, overrides), name=here.name, storage=str(here.parent))

    def phase(self, name: str) -> Path:
        return self.folder / name

    def checkpoints(self, phase: str) -> Path:
        return self.phase(phase) / "checkpoints"

    def model(self, phase: str) -> Path:
        return self.phase(phase) / "model"

    def metrics(self, phase: str) -> list[dict[str, Any]]:
        return list(json_rows(self.phase(phase) / METRICS))

    def events(self) -> list[dict[str, Any]]:
        return list(json_rows(self.folder / EVENTS))

    def finished_phases(self) -> set[str]:
        finished: set[str] = set()
        for event in self.events():
            if event["event"] == "phase_finished":
                finished.add(event["phase"])
            elif event["event"] == "rewound":
                finished -= event["to"].keys()
        return finished

    def rewound_to(self) -> dict[str, int]:
        """Steps to which phases were taken back and from which they have not gone on yet, by phase; 0: their beginning."""
        to: dict[str, int] = {}
        for event in self.events():
            if event["event"] == "rewound":
                to |= event["to"]
            elif event["event"] == "training":
                to.pop(event["phase"], None)
        return to

    def accepted_before(self) -> int:
        """The last attempt that accepted changes of job or data: checkpoints of attempts before it may differ. 0: none."""
        return max((e["attempt"] for e in self.events() if e["event"] == "changes_accepted"), default=0)

    def attempts(self) -> int:
        return sum(event["event"] == "started" for event in self.events())

    def state(self) -> str:
        """new | running | lost (its process is gone) | done | failed | interrupted."""
        endings = {"done": "done", "failed": "failed", "interrupted": "interrupted"}
        last = next((e["event"] for e in reversed(self.events()) if e["event"] in ("started", *endings)), None)
        if last is None:
            return "new"
        if last == "started":
            return "running" if _is_locked(self.folder / LOCK) else "lost"
        return endings[last]


def find(text: str, storage: Path = RUNS) -> RunFolder:
    """The run that a person means: a folder, or a name under `storage`. Raises InputError that lists those that exist."""
    for folder in (Path(text), storage / text):
        if (folder / JOB).exists():
            return RunFolder(folder)
    known = ", ".join(run.name for run in runs_in(storage)) or "none"
    raise InputError.of(text, f"no such run: neither a run folder nor a name in {storage}/ (there: {known})")


def runs_in(storage: Path) -> list[RunFolder]:
    """All runs in a folder, the newest last."""
    jobs_found = sorted(storage.glob(f"*/{JOB}"), key=lambda path: path.stat().st_mtime)
    return [RunFolder(path.parent) for path in jobs_found]


@dataclass
class OpenRun(RunFolder):
    """A run that this process works on: the lock is held, and what happens is written down."""

    folder: Path
    attempt: int
    _lock: IO[str]

    def event(self, kind: str, **facts: Any) -> None:
        append(self.folder / EVENTS, {"time": now(), "attempt": self.attempt, "event": kind, **facts})

    def close(self) -> None:
        self._lock.close()


@dataclass(frozen=True, kw_only=True)
class GoOn:
    """How to go on with a run, beyond going on where it stopped."""

    rewind: Mapping[str, int] = field(default_factory=dict)
    """Steps to take phases back to; 0 is the beginning."""
    accept_changes: bool = False
    """Go on though the job or its data are no longer what the checkpoints were trained on."""


def rewinding(run: RunFolder, step: int, phase: str | None = None) -> dict[str, int]:
    """What it takes to go on from a checkpoint: its phase (None: the last that has any) there, later ones at their beginning.

    Raises InputError if there is no such phase or checkpoint.
    """
    name = phase_with_checkpoints(run, phase)
    try:
        Checkpoints(place(run.checkpoints(name))).at(step)
    except CheckpointError as error:
        raise InputError.of("", str(error)) from error
    names = list(run.job().phases)
    return {name: step, **dict.fromkeys(names[names.index(name) + 1 :], 0)}


def phase_with_checkpoints(run: RunFolder, phase: str | None) -> str:
    """The phase that is asked for, or the last that has checkpoints. Raises InputError if there is none."""
    names = list(run.job().phases)
    if phase is not None and phase not in names:
        raise InputError.of(str(run.folder), f"no phase {phase}; there are: {', '.join(names)}")
    if phase is not None:
        return phase
    saved = [name for name in names if Checkpoints(place(run.checkpoints(name))).folders()]
    if not saved:
        raise InputError.of(str(run.folder), "no checkpoint was saved yet")
    return saved[-1]


def begin(job: Job, go_on: GoOn = GoOn()) -> OpenRun:
    """Make the run folder of a job, or go on in the one it has.

    Raises InputError as `check` does, and if the folder cannot be written or is being worked on.
    """
    check(job, go_on)
    folder = _folder(job)
    with _told_as_input(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(folder / LOCK)
        try:
            return _begin(folder, job, lock, go_on)
        except BaseException:
            lock.close()
            raise


@contextmanager
def _told_as_input(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another `storage`"
        raise InputError.of(str(folder), f"cannot use the run folder: {error.strerror}; {advice}") from error


def _begin(folder: Path, job: Job, lock: IO[str], go_on: GoOn) -> OpenRun:
    check(job, go_on)  # once more: another process may have come before the lock
    held = RunFolder(folder)
    changes = _changes(held, job) if (folder / JOB).exists() else []
    _replace(folder / JOB, jobs.dump(job))
    run = OpenRun(folder, held.attempts() + 1, lock)
    run.event("started", host=socket.gethostname(), pid=os.getpid())
    if go_on.accept_changes:
        run.event("changes_accepted", changes=changes)
    if go_on.rewind:
        run.event("rewound", to=dict(go_on.rewind))
    return run


def _changes(held: RunFolder, job: Job) -> list[str]:
    return jobs.differences(replace(held.job(), name=job.name), job)


def check(job: Job, go_on: GoOn = GoOn()) -> None:
    """Raises InputError if the run folder of a job holds something else, another job or a finished run. Writes nothing."""
    with _told_as_input(_folder(job)):
        if _folder(job).is_dir():
            _refuse_others(_folder(job), job, go_on)


def _folder(job: Job) -> Path:
    return Path(job.storage) / job.name


def _replace(path: Path, text: str) -> None:
    """Write a file such that a full disk or a crash leaves the old one."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _refuse_others(folder: Path, job: Job, go_on: GoOn) -> None:
    held = RunFolder(folder)
    if not (folder / JOB).exists():
        if strangers := sorted(p.name for p in folder.iterdir() if p.name not in (LOCK, f".{JOB}")):
            raise InputError.of(
                str(folder),
                f"not a run folder, and not empty (it holds {', '.join(strangers[:3])}); choose another name or storage",
            )
        return
    if not go_on.accept_changes and (changes := _changes(held, job)):
        raise InputError.of(
            str(folder),
            "this run folder holds another job; choose another `name:`, remove the folder, or go on with it all the same: "
            "`muster resume RUN --accept-changes key=value ...`. What differs:\n  " + "\n  ".join(changes),
        )
    if not go_on.rewind and held.finished_phases() >= set(job.phases):
        raise InputError.of(
            str(folder),
            "this run is finished; choose another `name:`, remove the folder to run it again, or go back with "
            "`muster resume RUN --step N`",
        )


def _take_lock(path: Path) -> IO[str]:
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise InputError.of(str(path.parent), f"this run is being worked on by {holder}") from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSONL file, in one write, so that a reader sees it whole or not at all."""
    with path.open("ab+") as file:
        torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"  # a full disk cut the row before
        file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
