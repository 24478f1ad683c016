"""Opens a run for writing: exclusively, in a folder that holds this job and nothing else.

One process works on a run at a time. In a local folder a lock ensures that; in a bucket, the claim of the latest
attempt.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from launcher.jobfile import job as jobs
from launcher.jobfile import yaml_with_lines
from launcher.jobfile.job import Job
from launcher.jobfile.phase_builder import SHARED
from launcher.jobfile.shared_settings import value_at
from launcher.jobfile.validation_messages import did_you_mean
from launcher.jobfile.yaml_with_lines import COMMAND_LINE, KeyPath, dotted
from launcher.runfolder import bucket_sync
from launcher.runfolder.bucket_sync import Mirror
from launcher.runfolder.run_folder import (
    EVENTS,
    JOB,
    LOCK,
    PATIENCE_S,
    RunFolder,
    now,
    phase_with_checkpoints,
    told_as_input,
)
from launcher.runfolder.small_files import SmallFiles
from training.checkpoint.format import CheckpointError
from training.checkpoint.repository import CLAIMS, Checkpoints, Claim, newest_claim, step_of
from training.errors import InputError, Problem
from training.io.versions import MUSTER, versions_of
from training.storage import StoragePath, is_remote, open_storage

_LOCK_S = 2.0
"""How long to wait for a lock."""


class OpenRun(RunFolder):
    """A run that this process writes to."""

    def __init__(self, folder: Path, attempt: int, lock: IO[str], remote: StoragePath | None = None):
        super().__init__(folder, remote)
        self.attempt = attempt
        self.files = SmallFiles()
        self._events = super().events()
        self._lock = lock
        self._mirror = None if remote is None else Mirror(folder, remote, Claim(remote / CLAIMS, attempt))

    def start_next_attempt(self) -> None:
        """Start the next attempt in this process, after one failed or moved to other workers. Raises Superseded."""
        if self.remote is not None and self._mirror is not None:
            self._mirror.claim = Claim(self.remote / CLAIMS, self.attempt + 1)
        self.attempt += 1
        self.event("started", host=socket.gethostname(), pid=os.getpid(), by_itself=True)

    def event(self, kind: str, **fields: Any) -> None:
        row = {"time": now(), "attempt": self.attempt, "event": kind, **fields}
        self._events.append(json.loads(json.dumps(row)))
        self.files.append(self.folder / EVENTS, row)
        if self._mirror is not None:
            self._mirror.wake()

    def events(self) -> list[dict[str, Any]]:
        """Return all events, including those that cannot be written at the moment."""
        return list(self._events)

    def flush(self) -> None:
        """Write everything to where the run is stored. Raises StorageError, OSError, Superseded."""
        self.files.flush()
        if self._mirror is not None:
            self._mirror.flush()

    def close(self) -> None:
        """Flush and release the lock. Raises as `flush` does if the rest cannot be written."""
        try:
            self.files.flush()
            if self._mirror is not None:
                self._mirror.close()
        finally:
            self._lock.close()


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Options of resuming a run, other than from where it stopped."""

    rewind: Mapping[str, int] = field(default_factory=dict)
    """Step to rewind each phase to; 0 is its beginning."""
    accept_changes: bool = False
    """Resume even if the job or its data differ from what the checkpoints were trained on."""


def rewinding(run: RunFolder, step: int, phase: str | None = None) -> dict[str, int]:
    """Return the step to rewind each phase to, in order to resume from a checkpoint: its phase (None: the last one with
    checkpoints) to that step, later phases to their beginning.

    Raises InputError if there is no such phase or checkpoint, or if the checkpoint no longer has optimizer state.
    """
    name = phase_with_checkpoints(run, phase)
    checkpoints = Checkpoints(run.checkpoints(name))
    try:
        folder = checkpoints.at(step)
    except CheckpointError as error:
        raise InputError.of("", str(error)) from error
    if folder not in (resumable := checkpoints.resumable()):
        steps = ", ".join(str(step_of(each)) for each in resumable) or "none"
        raise InputError.of(
            str(folder),
            "has weights only (checkpoint.keep_weights): it can be used to generate, evaluate and export, but not to "
            f"resume a run. {name} can be resumed at: {steps}",
        )
    names = list(run.job().phases)
    return {name: step, **dict.fromkeys(names[names.index(name) + 1 :], 0)}


def begin(job: Job, options: ResumeOptions = ResumeOptions()) -> OpenRun:
    """Create the run folder of a job, or open the one it has.

    Raises InputError as `check` does, and if the folder cannot be written or another process uses it.
    """
    check(job, options)
    remote = open_storage(_address(job)) if is_remote(job.storage) else None
    folder = Path(job.storage) / job.name if remote is None else bucket_sync.working_folder(remote)
    with told_as_input(_address(job)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(folder / LOCK)
        try:
            if remote is not None:
                bucket_sync.fetch(remote, folder)
            return _begin(RunFolder(folder, remote), job, lock, options)
        except BaseException:
            lock.close()
            raise


def _begin(held: RunFolder, job: Job, lock: IO[str], options: ResumeOptions) -> OpenRun:
    _refuse_others(held, job, options)  # once more: another process may have come before the lock
    changes = _changes(held, job) if (held.folder / JOB).exists() else []
    _replace(held.folder / JOB, jobs.dump(job))
    claimed = newest_claim(held.remote / CLAIMS) if held.remote else 0
    run = OpenRun(held.folder, max(held.attempts(), claimed) + 1, lock, held.remote)
    run.event("started", host=socket.gethostname(), pid=os.getpid(), versions=_versions())
    if options.accept_changes:
        run.event("changes_accepted", changes=changes)
    if options.rewind:
        run.event("rewound", to=dict(options.rewind))
    run.flush()
    return run


def _versions() -> dict[str, str]:
    """Return the installed versions of packages that affect the result; preflight checks that all workers match."""
    packages = (MUSTER, "torch", "deepspeed", "transformers", "peft", "ray")
    return {"python": platform.python_version(), **versions_of(packages)}


def _changes(held: RunFolder, job: Job) -> list[str]:
    return jobs.differences(replace(held.job(), name=job.name), job)


def check(job: Job, options: ResumeOptions = ResumeOptions(), only: str | None = None) -> None:
    """Raises InputError if the run folder of a job holds other files, a different job or a finished run. Read-only.

    `only`: the one phase to run. Raises InputError if it does not exist, is finished, or starts from an unfinished one.
    """
    address = _address(job)
    finished: set[str] = set()
    with told_as_input(address):
        if not is_remote(address):
            if Path(address).is_dir():
                _refuse_others(RunFolder(Path(address)), job, options)
                finished = RunFolder(Path(address)).finished_phases()
        else:
            remote = open_storage(address, patience_s=PATIENCE_S)
            run = RunFolder(bucket_sync.view(remote), remote)
            _refuse_others(run, job, options)
            finished = run.finished_phases()
    if only is not None:
        _refuse_phase(job, only, finished)


def recorded_commits(job: Job) -> dict[str, str]:
    """Return `RunFolder.commits` of the run of a job; empty if it has not started."""
    address = _address(job)
    with told_as_input(address):
        if not is_remote(address):
            return RunFolder(Path(address)).commits()
        remote = open_storage(address, patience_s=PATIENCE_S)
        return RunFolder(bucket_sync.view(remote), remote).commits()


def _refuse_phase(job: Job, only: str, finished: set[str]) -> None:
    if only not in job.phases:
        raise InputError.of(
            "--only",
            f"there is no phase {only}{did_you_mean(only, job.phases)}; the phases are {', '.join(job.phases)}",
        )
    if only in finished:
        raise InputError.of("--only", f"{only} is finished; rewind it with `muster resume RUN --step N --phase {only}`")
    phase = job.phases[only]
    if phase.starts_from_phase and phase.from_ not in finished:
        raise InputError.of(
            "--only", f"{only} starts from {phase.from_}, which is not finished; run {phase.from_} first"
        )


def _address(job: Job) -> str:
    return f"{job.storage.rstrip('/')}/{job.name}"


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically: after a full disk or a crash the old one is intact."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _refuse_others(held: RunFolder, job: Job, options: ResumeOptions) -> None:
    if not (held.folder / JOB).exists():
        if strangers := sorted(name for name in held.root.children() if name not in (LOCK, f".{JOB}", CLAIMS)):
            raise InputError.of(
                held.address,
                f"not a run folder, and not empty (it holds {', '.join(strangers[:3])}); choose a different name or "
                "storage",
            )
        return
    finished = held.finished_phases() - options.rewind.keys()
    is_over = not options.rewind and finished >= set(job.phases)
    if not is_over:
        _refuse_overrides_of(finished, held, job)
    if not options.accept_changes and (changes := _changes(held, job)):
        raise InputError.of(
            held.address,
            "this run folder belongs to a different job; choose a different `name:`, remove the folder, or resume it "
            "with the changes: "
            "`muster resume RUN --accept-changes key=value ...`. Differences:\n  " + "\n  ".join(changes),
        )
    if is_over:
        raise InputError.of(
            held.address,
            "this run is finished; choose a different `name:`, remove the folder to run it again, or rewind it with "
            "`muster resume RUN --step N`",
        )


def _refuse_overrides_of(finished: set[str], held: RunFolder, job: Job) -> None:
    """Raises InputError for settings from the command line that change only phases which are finished."""
    before = {name: phase.model_dump(by_alias=True) for name, phase in held.job().phases.items()}
    after = {name: phase.model_dump(by_alias=True) for name, phase in job.phases.items()}
    problems = []
    for path in _from_command_line(job):
        names = [str(path[1])] if path[0] == "phases" else list(after)
        inside = path[2:] if path[0] == "phases" else path
        changed = {name for name in names if value_at(before.get(name), inside) != value_at(after[name], inside)}
        if changed and changed <= finished:
            name = min(changed, key=list(after).index)
            reason = f"the phase {name} is finished; rewind it with `muster resume RUN --step N --phase {name}`"
            problems.append(Problem("command line", dotted(path), f"has no effect: {reason}"))
    if problems:
        raise InputError(problems)


def _from_command_line(job: Job) -> Iterator[KeyPath]:
    """Yield the settings of phases and the shared ones that were given on the command line."""
    for path, value in yaml_with_lines.paths(job.document.data):
        of_phases = path[0] in SHARED or (path[0] == "phases" and len(path) > 2)
        if of_phases and not isinstance(value, dict | list) and job.document.lines.get(path) == COMMAND_LINE:
            yield path


def _take_lock(path: Path) -> IO[str]:
    """Take the lock of a run. The file is private to its owner, since anyone who can read a file can lock it."""
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    with suppress(PermissionError):  # somebody else's, who lets us write it
        os.fchmod(lock.fileno(), 0o600)
    if not _locked(lock):
        holder = lock.read().strip()
        lock.close()
        raise InputError.of(str(path.parent), f"this run is in use by {holder}")
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _locked(lock: IO[str]) -> bool:
    """Try to take a lock for a short while, since `muster status` holds it briefly. Returns whether that worked."""
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
