"""Reads a run: its job, events, metrics and results. `launcher/driver/open_run.py` opens one for writing.

runs/NAME/job.yaml, events.jsonl,
runs/NAME/PHASE/{metrics.jsonl, answers/, profile/, tensorboard/, checkpoints/, model/, logs/...}

It is in a folder or in a bucket. The small files of a bucket are copied to this machine first.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.jobfile import job as jobs
from launcher.jobfile.job import Job
from launcher.jobfile.yaml_with_lines import JOB_FILE
from launcher.runfolder import bucket_sync
from launcher.runfolder.bucket_sync import is_alive
from training.checkpoint.repository import Checkpoints
from training.errors import InputError, StorageError
from training.io.paths import absolute
from training.metric_schema import with_current_names
from training.storage import Local, StoragePath, is_remote, open_storage

PATIENCE_S = 10.0
"""How long a command waits for a bucket that does not answer."""
RUNS = Path("runs")
"""The folder in which a run is searched by name."""
JOB, EVENTS, METRICS, LOCK = JOB_FILE, "events.jsonl", "metrics.jsonl", ".lock"
ENDINGS = ("done", "partial", "failed", "interrupted")
"""Events that end an attempt, and the states of a run after them."""
ANSWERS, SAMPLES = "answers", "samples.jsonl"
_NO_RUN = "not a run folder (there is no job.yaml in it)"


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file that may be being written; incomplete rows and non-objects are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def evaluations_in(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of metrics that evaluations wrote."""
    whole = (row for row in rows if type(row.get("step")) is int)
    return [row for row in whole if any(name.startswith("eval_") for name in row)]


_AMOUNTS = ("step", "iteration", "step_s", "tokens", "samples", "tokens_per_s", "memory_gib")
_FIGURES = ("loss", "reward", "learning_rate", "grad_norm")
_MOST = 2**63


def _is_figure(name: str, value: Any) -> bool:
    """Return whether a value is valid for a metric of this name. A run writes no row with an invalid one."""
    if name in _AMOUNTS:
        return isinstance(value, int | float) and 0 <= value < _MOST
    if name in _FIGURES or name.startswith("eval_"):
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < _MOST)
    return True


def _rewound(event: Mapping[str, Any]) -> dict[str, int]:
    to = event.get("to")
    return to if isinstance(to, dict) else {}


class RunFolder:
    """A run. `folder` has its small files; checkpoints and models are below `root`, which is the same folder except for
    buckets."""

    def __init__(self, folder: Path, remote: StoragePath | None = None):
        self.folder = folder
        self.remote = remote

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def root(self) -> StoragePath:
        return self.remote or Local(self.folder)

    @property
    def address(self) -> str:
        """The address by which the user names the run."""
        return str(self.root)

    def job(self) -> Job:
        """Return the job as it was resolved when the run started. Raises InputError if this is not a run folder."""
        if not (self.folder / JOB).exists():
            raise InputError.of(self.address, _NO_RUN)
        return jobs.read(self.folder / JOB)

    def job_here(self, overrides: Sequence[str] = ()) -> Job:
        """Return the job to resume, with the folder where the run is now.
        Raises InputError for overrides that would move it."""
        refuse_another_folder(overrides)
        here = self.address if self.remote else str(self.folder.resolve())
        storage, _, name = here.rpartition("/")
        return replace(jobs.load(self.folder / JOB, overrides), name=name, storage=storage)

    def phase(self, name: str) -> Path:
        return self.folder / name

    def checkpoints(self, phase: str) -> StoragePath:
        return self.root / phase / "checkpoints"

    def model(self, phase: str) -> StoragePath:
        return self.root / phase / "model"

    def profiles(self, phase: str) -> StoragePath:
        return self.root / phase / "profile"

    def phase_names(self) -> list[str]:
        """Return the phases of the job; if this version cannot read the job, the phases that have metrics."""
        try:
            return list(self.job().phases)
        except InputError:
            return [file.parent.name for file in sorted(self.folder.glob(f"*/{METRICS}"))]

    def metrics(self, phase: str) -> list[dict[str, Any]]:
        """All rows of metrics, the oldest first, with the current names of the metrics."""
        rows = map(with_current_names, json_rows(self.phase(phase) / METRICS))
        return [row for row in rows if all(_is_figure(name, value) for name, value in row.items())]

    def evaluations(self, phase: str) -> list[dict[str, Any]]:
        """Return the rows of metrics that evaluations wrote, the oldest first."""
        return evaluations_in(self.metrics(phase))

    def chosen_step(self, phase: str) -> int | None:
        """Return the step whose weights a finished phase ended with: the last or the best. None: it is not finished."""
        ends = [e for e in self.events() if e["event"] == "phase_finished" and e.get("phase") == phase]
        step = str(ends[-1].get("checkpoint")).rpartition("-")[2] if ends else ""
        return int(step) if step.isdigit() else None

    def answers(self, phase: str, step: int, kind: str = "") -> list[dict[str, Any]]:
        """Return the responses of the evaluation at a step; `kind` is `verdict-` for critiques. May be empty."""
        return list(json_rows(self.phase(phase) / ANSWERS / f"{kind}step-{step:08d}.jsonl"))

    def events(self) -> list[dict[str, Any]]:
        rows = json_rows(self.folder / EVENTS)
        return [row for row in rows if isinstance(row.get("event"), str) and isinstance(row.get("phase", ""), str)]

    def finished_phases(self) -> set[str]:
        finished: set[str] = set()
        for event in self.events():
            if event["event"] == "phase_finished":
                finished.add(event.get("phase", ""))
            elif event["event"] == "rewound":
                finished -= _rewound(event).keys()
        return finished

    def rewound_to(self) -> dict[str, int]:
        """Return the steps to which phases were rewound and from which they have not been resumed yet, by phase; 0: the
        beginning."""
        to: dict[str, int] = {}
        for event in self.events():
            if event["event"] == "rewound":
                to |= _rewound(event)
            elif event["event"] == "training":
                to.pop(event.get("phase", ""), None)
        return to

    def accepted_before(self) -> int:
        """Return the last attempt that accepted changes of job or data: checkpoints of earlier attempts may differ.
        0: none."""
        return max((e["attempt"] for e in self.events() if e["event"] == "changes_accepted"), default=0)

    def commits(self) -> dict[str, str]:
        """Return the commits of branches and tags on the Hugging Face hub that the run uses; see hub_revisions.py."""
        found: dict[str, str] = {}
        for event in self.events():
            if event["event"] == "revisions" and isinstance(event.get("commits"), dict):
                found |= event["commits"]
        return found

    def attempts(self) -> int:
        return sum(event["event"] == "started" for event in self.events())

    def state(self) -> str:
        """new | running | lost (its process is gone) | done | partial | failed | interrupted.

        partial: the phases that `--only` chose are finished, and others remain.
        Versions before 0.2 wrote `interrupted` for it.
        """
        last = next((e["event"] for e in reversed(self.events()) if e["event"] in ("started", *ENDINGS)), None)
        if last is None:
            return "new"
        if last == "started":
            at_work = is_alive(self.remote) if self.remote else _is_locked(self.folder / LOCK)
            return "running" if at_work else "lost"
        return str(last)


def refuse_another_folder(overrides: Sequence[str]) -> None:
    """Raises InputError for overrides that would change the run's folder."""
    for override in overrides:
        if override.partition("=")[0].strip() in ("name", "storage"):
            raise InputError.of(
                "command line",
                "a run cannot change its folder; start a new run with `muster run` and a different name",
                override,
            )


def find(text: str, storage: Path = RUNS) -> RunFolder:
    """Return the run that the user names: a folder, a name under `storage`, or an address in a bucket.

    Raises InputError that lists the existing ones.
    """
    if is_remote(text):
        remote = open_storage(text, patience_s=PATIENCE_S)
        with told_as_input(text):
            run = RunFolder(bucket_sync.view(remote), remote)
        if not (run.folder / JOB).exists():
            raise InputError.of(text, _NO_RUN)
        return run
    for folder in (Path(text), storage / text):
        if (folder / JOB).exists():
            # `.` and `RUN/PHASE/..` name a run, too; its last part has to be the run's name.
            return RunFolder(Path(absolute(folder)) if folder.name in ("", "..") else folder)
    if Path(text).is_file():
        raise InputError.of(
            text, f"is a file, not a run; start or resume the run of a job file with `muster run {text}`"
        )
    known = ", ".join(run.name for run in runs_in(str(storage))) or "none"
    raise InputError.of(text, f"no such run: neither a run folder nor a name in {storage}/ (there: {known})")


def find_part(text: str) -> tuple[RunFolder, str | None]:
    """Return the run, and the phase if there is one, of RUN or RUN/PHASE.
    Raises InputError if there is no such run or phase."""
    try:
        return find(text), None
    except InputError as error:
        head, _, phase = text.rstrip("/").rpartition("/")
        if not head or (is_remote(text) and _NO_RUN not in str(error)):  # the network or the credentials
            raise
    try:
        run = find(head)
    except InputError:
        raise InputError.of(text, "no such run; give a run folder, the name of a run in runs/, or RUN/PHASE") from None
    if phase not in (names := run.phase_names()):
        raise InputError.of(run.address, f"no phase {phase}; there are: {', '.join(names)}")
    return run, phase


def labels(chosen: Sequence[RunFolder]) -> list[str]:
    """Return unique labels: the names, with as much of the address before them as necessary."""
    addresses = [run.address if run.remote else str(run.folder.resolve()) for run in chosen]
    found = [run.name for run in chosen]
    depth = 2
    while len(set(found)) < len(found):
        twice = {label for label, count in Counter(found).items() if count > 1}
        longer = ["/".join(address.split("/")[-depth:]) for address in addresses]
        found = [more if label in twice else label for label, more in zip(found, longer, strict=True)]
        depth += 1
    return found


def runs_in(storage: str) -> list[RunFolder]:
    """Return all runs in a folder, the newest last, or in a bucket, by name."""
    if not is_remote(storage):
        jobs_found = sorted(Path(storage).glob(f"*/{JOB}"), key=lambda path: path.stat().st_mtime)
        return [RunFolder(path.parent) for path in jobs_found]
    root = open_storage(storage, patience_s=PATIENCE_S)
    with told_as_input(storage):
        remotes = [root / name for name, size in sorted(root.children().items()) if size is None]
        return [RunFolder(bucket_sync.view(remote), remote) for remote in remotes if JOB in remote.children()]


def phase_with_checkpoints(run: RunFolder, phase: str | None) -> str:
    """Return the given phase, or the last one with checkpoints. Raises InputError if there is none."""
    names = list(run.job().phases)
    if phase is not None and phase not in names:
        raise InputError.of(run.address, f"no phase {phase}; there are: {', '.join(names)}")
    if phase is not None:
        return phase
    saved = [name for name in names if Checkpoints(run.checkpoints(name)).folders()]
    if not saved:
        raise InputError.of(run.address, "has no checkpoints yet")
    return saved[-1]


@contextmanager
def told_as_input(address: str) -> Iterator[None]:
    """Turn errors of a folder or bucket within the block into InputError."""
    try:
        yield
    except StorageError as error:
        raise InputError.of("", f"{error}; check the network, the address and the credentials") from error
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a different `storage`"
        raise InputError.of(address, f"cannot use the run folder: {error.strerror or error}; {advice}") from error


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        return _is_locked_by_another_user(path)
    except OSError:
        return False
    return False


def _is_locked_by_another_user(path: Path) -> bool:
    """Return whether the kernel lists a lock on the file, which is private to its owner. Only for this machine."""
    try:
        inode, locks = path.stat().st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    held = (line.split() for line in locks if "->" not in line)  # `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF`
    return any(fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode) for fields in held)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
