"""Runs a job: its phases in order, each on its workers. The only place that decides what happens after a failure."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launcher import runs, trackers
from launcher.job import Job, job_hash
from launcher.progress import PhaseProgress
from training.checkpoint import Checkpoints
from training.config import Phase
from training.errors import MusterError
from training.group import Group
from training.recipes import RECIPES, resolve

if TYPE_CHECKING:
    from launcher.workers import WorkerGroup
    from training.facts import Facts

DONE, FAILED, INPUT_WRONG, INTERRUPTED = 0, 1, 2, 130
_NOT_FOR_TRACKERS = ("step", "attempt", "workers")


def cache_folder() -> Path:
    """Where tokenised data is kept between runs."""
    return Path(os.environ.get("MUSTER_CACHE") or Path.home() / ".cache" / "muster")


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


class PhaseRun:
    """What a recipe's driver is offered while it runs one phase (the `Hooks` of training/recipes)."""

    def __init__(self, run: runs.OpenRun, job: Job, name: str, interrupts: Interrupts, progress: PhaseProgress):
        self.run, self.name, self.interrupts, self.progress = run, name, interrupts, progress
        self.folder = run.phase(name)
        self.job_hash = job_hash(job)
        self.checkpoints = Checkpoints(run.checkpoints(name), attempt=run.attempt)
        self.trackers = trackers.open_all(job.track, job.name, name, self.folder, job.phases[name].model_dump())

    def log(self, row: Mapping[str, Any]) -> None:
        runs.append(self.folder / runs.METRICS, {**row, "attempt": self.run.attempt})
        self.progress.row(row)
        numbers = {name: value for name, value in row.items() if name not in _NOT_FOR_TRACKERS}
        for tracker in self.trackers:
            tracker.log(row["step"], numbers)

    def event(self, kind: str, **facts: Any) -> None:
        self.run.event(kind, phase=self.name, **facts)
        if kind == "checkpoint_damaged":
            self.progress.say(f"{facts['finding']}; looking at the one before")
        elif kind == "restored":
            self.progress.say(f"{self.name}: goes on after step {facts['step']}")

    def started(self, facts: Facts, step: int) -> None:
        for note in facts.notes:
            self.progress.say(f"{self.name}: {note}")
        self.progress.say(
            f"{self.name}: {facts.num_parameters:,} parameters, {facts.dtype} on {facts.device}, {facts.attention} attention; "
            f"{facts.num_samples:,} samples, {facts.total_steps:,} steps"
        )
        self.event("training", step=step, total_steps=facts.total_steps, parameters=facts.num_parameters)
        self._forget_after(step)
        self.interrupts.training = True
        self.progress.start(facts.total_steps, step)

    def _forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be done again: the file is the curve, each step in it once."""
        path = self.folder / runs.METRICS
        rows = list(runs.json_rows(path))
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            path.unlink()
            for row in kept:
                runs.append(path, row)

    def stop_requested(self) -> bool:
        return self.interrupts.requested

    def close(self) -> None:
        self.interrupts.training = False
        self.progress.close()
        for tracker in self.trackers:
            tracker.close()


def run_job(job: Job, *, inline: bool, console: Console) -> int:
    """Run a job to its end, or go on with it; returns the exit status. Raises InputError before anything is started."""
    trackers.check(job.track)
    prepare(job, console)
    run = runs.begin(job)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"run {run.folder}, attempt {run.attempt}")
    with ExitStack() as stack:
        stack.callback(run.close)
        interrupts = stack.enter_context(Interrupts(say))
        try:
            if not inline:
                from launcher.session import ray_session

                stack.enter_context(ray_session(max(phase.resources.workers for phase in job.phases.values())))
            done = all(_run_phase(run, job, name, interrupts, console, inline) for name in _unfinished(run, job))
        except KeyboardInterrupt:
            run.event("interrupted", orderly=False)
            say("stopped at once; `muster resume` goes on from the last checkpoint")
            return INTERRUPTED
        except (MusterError, OSError) as error:
            with suppress(OSError):  # the disk may be what has failed
                run.event("failed", error=str(error))
            say(f"{job.name} failed\n{error}\n`muster resume {run.folder}` goes on from the last checkpoint")
            return FAILED
        run.event("done" if done else "interrupted")
        if not done:
            say(f"stopped; `muster resume {run.folder}` goes on")
        return DONE if done else INTERRUPTED


def prepare(job: Job, console: Console) -> None:
    """Check and tokenise the data of every phase, once. Raises InputError with the bad rows."""
    from training.data.stores import open_stores

    for phase in job.phases.values():
        open_stores(phase, cache_folder())


def _unfinished(run: runs.OpenRun, job: Job) -> Iterator[str]:
    finished = run.finished_phases()
    return (name for name in job.phases if name not in finished)


def _run_phase(run: runs.OpenRun, job: Job, name: str, interrupts: Interrupts, console: Console, inline: bool) -> bool:
    """Whether the phase came to its end; False when it was asked to stop."""
    phase = with_its_start(job.phases[name], run)
    progress = PhaseProgress(name, console, phase.log_every)
    run.phase(name).mkdir(exist_ok=True)
    run.event("phase_started", phase=name)
    hooks = PhaseRun(run, job, name, interrupts, progress)
    try:
        with _groups(phase, run.phase(name) / "logs" / f"attempt-{run.attempt}", progress, name, inline) as groups:
            last = resolve(RECIPES[phase.recipe].run)(phase, groups, hooks)
            if last is None:
                return False
            _export(next(iter(groups.values())), last, run.model(name))
    finally:
        hooks.close()
    run.event("phase_finished", phase=name, checkpoint=str(last), model=str(run.model(name)))
    progress.say(f"{name}: done; the model is in {run.model(name)}")
    return True


def with_its_start(phase: Phase, run: runs.RunFolder) -> Phase:
    """The phase with the model of the phase that it starts from."""
    if phase.from_ is None:
        return phase
    start = str(run.model(phase.from_))
    return phase.model_copy(update={"model": phase.model.model_copy(update={"path": start, "tokenizer": None})})


def _export(group: Group, checkpoint: Path, out: Path) -> None:
    from training.group import results

    results(group.call("export", str(checkpoint), str(out)), timeout_s=3600.0)


@contextmanager
def _groups(phase: Phase, logs: Path, progress: PhaseProgress, name: str, inline: bool) -> Iterator[dict[str, Group]]:
    """The groups of a phase, by role, with the roles built."""
    (role, target), *_ = RECIPES[phase.recipe].roles.items()
    arguments = (phase, str(cache_folder()))
    if inline:
        with _inline_group(phase, role, target, arguments) as group:
            yield {role: group}
        return
    from launcher.workers import WorkerGroup

    _warn_of_few_cores(phase, progress)
    workers = WorkerGroup(phase.resources, logs, progress.say)
    try:
        with _following(workers, name, role, progress):
            yield {role: workers.build(role, target, *arguments)}
    finally:
        workers.close()


def _warn_of_few_cores(phase: Phase, progress: PhaseProgress) -> None:
    cores = os.cpu_count() or 1
    if "RAY_ADDRESS" not in os.environ and phase.resources.workers > cores and phase.resources.gpus_per_worker != 1:
        progress.say(f"{phase.resources.workers} workers share {cores} cores: they take turns")


@contextmanager
def _inline_group(phase: Phase, role: str, target: str, arguments: tuple) -> Iterator[Group]:
    from training.distributed import Seat, join, leave, set_environment
    from training.group import InlineGroup, Worker

    threads = phase.resources.threads if phase.resources.threads != "auto" else os.cpu_count() or 1
    device = _inline_device(phase)
    seat = Seat(rank=0, size=1, threads=threads, device=device)
    set_environment(seat)
    join(seat)
    try:
        worker = Worker(seat)
        worker.build(role, target, *arguments)
        yield InlineGroup(worker, role)
    finally:
        leave()


def _inline_device(phase: Phase) -> Any:
    import torch

    return "cuda" if phase.resources.gpus_per_worker != 0 and torch.cuda.is_available() else "cpu"


@contextmanager
def _following(workers: WorkerGroup, phase: str, role: str, progress: PhaseProgress) -> Iterator[None]:
    """Show what workers print, with their names, while the block runs. Of many workers only the first."""
    ended = threading.Event()
    followed = range(workers.size if workers.size <= 8 else 1)
    offsets = dict.fromkeys(followed, 0)

    def show() -> None:
        for rank in followed:
            text = workers.read_log(rank, offsets[rank])
            whole = text[: text.rfind(b"\n") + 1]
            offsets[rank] += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if line.strip():
                    progress.say(f"{phase}/{role}-{rank} | {line}")

    def follow() -> None:
        while not ended.wait(1.0):
            show()

    thread = threading.Thread(target=follow, name="log-follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
        show()
