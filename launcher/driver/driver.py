"""Runs a job: its phases in order, each on its workers. The only place that decides what happens after a failure."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console

from launcher.driver import model_probe, open_run
from launcher.driver.budget import Budget
from launcher.driver.open_run import OpenRun, ResumeOptions
from launcher.driver.phase_run import PhaseRun
from launcher.driver.progress import PhaseProgress
from launcher.driver.recovery import Recovery
from launcher.driver.signals import Interrupts
from launcher.jobfile.job import ENV_NAMES, Job
from launcher.process import output
from launcher.process.exit_status import ExitStatus, after_signal
from launcher.runfolder import hub_revisions
from launcher.runfolder.cache import cache_folder
from launcher.runfolder.run_folder import RunFolder
from launcher.workers import supervisor
from launcher.workers.errors import NoMachines, Raised, WorkerDied, describe
from launcher.workers.worker_set import WorkerSet, worker_set_of
from training.config import Phase
from training.data.token_store import BAD_ROWS
from training.errors import InputError, MusterError, StorageError, TrainingError
from training.group import Group, results
from training.model_folder import tokenizer_of, tokenizer_revision
from training.recipes import RECIPES, resolve
from training.storage import StoragePath

_EXPORT_S = 3600.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that the command line gives beside the job."""

    inline: bool
    only: str | None
    preflight: bool


def run_job(
    job: Job,
    *,
    inline: bool,
    console: Console,
    resume_options: ResumeOptions = ResumeOptions(),
    only: str | None = None,
    preflight: bool = True,
) -> ExitStatus:
    """Run a job to its end, or resume it; returns the exit status. `only`: run that phase alone; `preflight`: check the
    machines before the first step.

    Raises InputError before a run folder is touched or a worker is started, TrainingError if Ray cannot be started.
    """
    open_run.check(job, resume_options, only)
    recorded = open_run.recorded_commits(job)
    looked_up = hub_revisions.look_up(job, recorded)
    with ExitStack() as stack:
        outputs = stack.enter_context(output.kept_going())
        interrupts = stack.enter_context(Interrupts())
        prepared = _get_ready(job, recorded | looked_up, stack, inline=inline)
        run = open_run.begin(job, resume_options)
        stack.callback(run.close)
        outputs.report_to(partial(_note_output, run))
        if looked_up:
            run.event("revisions", commits=looked_up)
        _list_bad_rows(run, prepared)
        _note_damage(run, prepared)
        status = _run_phases(run, job, interrupts, console, RunOptions(inline, only, preflight))
        interrupts.end()
        return status


def _note_output(run: OpenRun, stream: str, error: str) -> None:
    with suppress(StorageError):  # raised again by whoever writes next
        run.event("output_failed", stream=stream, error=error)


class Prepared(NamedTuple):
    """The prepared data of a phase."""

    folder: Path
    """The folder of the tokenized training samples."""
    damage: list[str]
    """What was wrong with tokenized data that had to be rebuilt."""


def _get_ready(job: Job, commits: Mapping[str, str], stack: ExitStack, *, inline: bool) -> dict[str, Prepared]:
    """Prepare the data while Ray starts, which is mostly waiting. Returns what `prepare` returns."""
    if inline:
        return prepare(job, commits)
    from launcher.workers.ray_session import own_fork_server, ray_session

    os.environ[ENV_NAMES] = " ".join(job.env)
    stack.callback(_sweep_stores)
    stack.enter_context(own_fork_server())
    wait_for_data = _in_background(lambda: prepare(job, commits, apart=True))
    stack.enter_context(ray_session(max(phase.num_workers for phase in job.phases.values())))
    return wait_for_data()


def _sweep_stores() -> None:
    """Remove unfinished token stores of processes that ended early."""
    from training.data.token_store import sweep_unfinished

    sweep_unfinished(cache_folder())


def _list_bad_rows(run: OpenRun, prepared: Mapping[str, Prepared]) -> None:
    """Copy the list of dropped rows into the folder of their phase."""
    for phase, (folder, _) in prepared.items():
        if (folder / BAD_ROWS).exists():
            run.phase(phase).mkdir(exist_ok=True)
            shutil.copyfile(folder / BAD_ROWS, run.phase(phase) / BAD_ROWS)


def _note_damage(run: OpenRun, prepared: Mapping[str, Prepared]) -> None:
    for phase, (_, damage) in prepared.items():
        for finding in damage:
            run.event("data_damaged", phase=phase, finding=finding, rank=None)


def _in_background(function: Callable[[], Result]) -> Callable[[], Result]:
    """Start a call in a daemon thread. Returns a function that waits for its result, or raises its error."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # which is for the main thread, when it can be heard
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    def wait() -> Result:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    thread = threading.Thread(target=attempt, daemon=True)  # Ctrl-C need not wait for it
    thread.start()
    return wait


def _run_phases(run: OpenRun, job: Job, interrupts: Interrupts, console: Console, options: RunOptions) -> ExitStatus:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"run {run.address}, attempt {run.attempt}")
    budget = Budget(run.folder, job.max_hours, job.max_cost, files=run.files)
    try:
        if budget.reached:
            raise InputError.of(run.address, f"{budget.reached}; raise the limit to resume")
        wanted = [name for name in _unfinished(run, job) if options.only in (None, name)]
        if wanted and (finished := [name for name in job.phases if name in run.finished_phases()]):
            say(f"finished phases: {', '.join(finished)}; to run: {', '.join(wanted)}")
        done = all(_run_phase(run, job, name, interrupts, budget, console, options) for name in wanted)
    except KeyboardInterrupt:
        with suppress(StorageError):
            run.event("interrupted", orderly=False)
        say(f"stopped immediately; resume from the last checkpoint with `muster resume {run.address}`")
        return after_signal(interrupts.number)
    except (MusterError, OSError) as error:
        _record_failure(run, error)
        say(f"{job.name} failed\n{error}\nFix this, then resume with `muster resume {run.address}`")
        if isinstance(error, NoMachines):
            return ExitStatus.TRY_AGAIN
        return ExitStatus.INVALID_INPUT if isinstance(error, InputError) else ExitStatus.FAILED
    except Exception as error:  # a defect: recorded, and shown with its traceback
        _record_failure(run, error)
        raise
    rest = list(_unfinished(run, job))
    _record_end(run, job, rest, stopped=not done)
    if not done and budget.reached and not interrupts.requested:
        say(
            f"stopped and saved: {budget.reached}; resume with `muster resume {run.address} max_hours=...` or "
            "`max_cost=...`"
        )
        return ExitStatus.LIMIT_REACHED
    if done and rest:
        say(f"{options.only} is finished; `muster resume {run.address}` runs the remaining phases: {', '.join(rest)}")
    elif not done:
        say(f"stopped; resume with `muster resume {run.address}`")
    return ExitStatus.DONE if done else after_signal(interrupts.number)


def _record_end(run: OpenRun, job: Job, rest: list[str], *, stopped: bool) -> None:
    """Record how the run ended. `rest`: the phases that are not finished; unless `stopped`, --only excluded them."""
    if stopped:
        run.event("interrupted")
    elif rest:
        run.event("partial", finished=[name for name in job.phases if name not in rest], remaining=rest)
    else:
        run.event("done")


def _record_failure(run: OpenRun, error: Exception) -> None:
    with suppress(StorageError):  # it may be what has failed
        run.event("failed", error=str(error) if isinstance(error, MusterError) else repr(error))


def prepare(job: Job, commits: Mapping[str, str] | None = None, *, apart: bool = False) -> dict[str, Prepared]:
    """Check and tokenize the data of every phase once; returns them by phase. Also examines the models.
    Raises InputError with every problem of any of them.

    `commits`: the commits of sources on the Hugging Face hub; see hub_revisions.py. `apart`: use a fork of the fork
    server, if there is one, which has the imports already; that saves seconds, and 0.3 GiB in this process.
    """
    from training.data import questions
    from training.data.phase_data import prepare_phase as prepare_data

    def prepare_phase(phase: Phase) -> Prepared:
        phase = hub_revisions.with_commits(phase, commits or {})
        questions.check(phase)
        model_probe.examined(phase, apart=apart)
        if not (apart and supervisor.has_fork_server()):
            stores, _ = prepare_data(phase, cache_folder())
            return Prepared(stores.train.folder, stores.damage)
        try:
            folder, damage = supervisor.apart("prepare", phase, str(cache_folder()), dict(os.environ))
            return Prepared(Path(folder), damage)
        except (Raised, WorkerDied) as error:
            trace = f"\n{error.trace}" if isinstance(error, Raised) else ""
            raise TrainingError(f"the process that prepares the data {describe(error)}{trace}") from error

    return job.look_at_phases(prepare_phase)


def _unfinished(run: OpenRun, job: Job) -> Iterator[str]:
    finished = run.finished_phases()
    return (name for name in job.phases if name not in finished)


def _run_phase(
    run: OpenRun, job: Job, name: str, interrupts: Interrupts, budget: Budget, console: Console, options: RunOptions
) -> bool:
    """Whether the phase came to its end; False when it was asked to stop, or has used up what it may."""
    if interrupts.requested or budget.reached:
        return False
    phase = with_its_start(job.phases[name], run)
    progress = PhaseProgress(name, console, phase.log_every)
    run.files.patiently(lambda: run.phase(name).mkdir(exist_ok=True))
    run.event("phase_started", phase=name)

    def warn(what: str) -> None:
        run.event("warning", phase=name, what=what)
        progress.say(f"{name}: {what}")

    if not options.inline:
        model_probe.examined(phase)
        model_probe.pass_on(phase)
    recovery = Recovery(run, name, phase, progress.say)
    with worker_set_of(phase, name, cache_folder(), progress.say, warn, inline=options.inline) as worker_set:
        while True:
            run.files.flush()  # while the storage is away, an attempt would begin anew in its place
            hooks = PhaseRun(run, job, name, interrupts, budget, progress, worker_set, recovery.skipped())
            try:
                with closing(hooks):
                    last = _attempt(run, phase, name, hooks, worker_set, preflight=options.preflight)
            except MusterError as error:
                if options.inline:
                    raise
                decision = recovery.after(error, step=hooks.step_in_hand(), checkpoint=hooks.saved_step)
                if interrupts.requested:
                    return False
                worker_set.avoid(decision.avoid)
            else:
                if last is not None:
                    break
                if interrupts.requested:
                    return False
                if budget.reached:
                    run.event("limit_reached", phase=name, what=budget.reached)
                    return False
                run.event("moved", phase=name, why=worker_set.why_moved)
                progress.say(f"{name}: saved; {worker_set.why_moved}; restarting the workers")
            run.start_next_attempt()
    run.event("phase_finished", phase=name, checkpoint=str(last), model=str(run.model(name)))
    progress.say(f"{name}: done; the model is in {run.model(name)}")
    return True


def _attempt(
    run: OpenRun, phase: Phase, name: str, hooks: PhaseRun, worker_set: WorkerSet, *, preflight: bool
) -> StoragePath | None:
    """Run one attempt of a phase from its newest checkpoint. Returns its last checkpoint, or None if it was stopped."""
    with worker_set.attempt(run.phase(name) / "logs" / f"attempt-{run.attempt}") as groups:
        run.event("workers", phase=name, workers=worker_set.members())
        hooks.budget.begin(worker_set.price())
        try:
            if (
                preflight
                and (figures := worker_set.check(str(hooks.checkpoints.staging), _room_for_two(phase))) is not None
            ):
                run.event("preflight", phase=name, **figures)
            last: StoragePath | None = resolve(RECIPES[phase.recipe].run)(phase, groups, hooks)
            hooks.interrupts.training = False  # all is saved: a request to stop does not wait for the export
            if last is None or hooks.interrupts.requested:
                return None
            _export(next(iter(groups.values())), last, run.model(name))
            return last
        finally:
            hooks.budget.end()


def _room_for_two(phase: Phase) -> int:
    """Return the bytes of two checkpoints: one is kept until the next is complete. 0 if the model is not known yet."""
    from launcher.plan import plan

    try:
        return 2 * plan.checkpoint_bytes_of(phase)
    except InputError:
        return 0


def with_its_start(phase: Phase, run: RunFolder) -> Phase:
    """Return the phase with the model of the phase that it starts from, the tokenizer that its data was checked with,
    and the commits of the Hugging Face hub that the run uses."""
    phase = hub_revisions.with_commits(phase, run.commits())
    if phase.starts_from_phase:
        assert phase.from_ is not None
        changes: dict[str, str | None] = {"path": str(run.model(phase.from_)), "tokenizer": tokenizer_of(phase.model)}
        changes["tokenizer_revision"] = tokenizer_revision(phase.model)
        phase = phase.model_copy(update={"model": phase.model.model_copy(update=changes)})
    return _with_its_rewards(phase, run)


def _with_its_rewards(phase: Phase, run: RunFolder) -> Phase:
    """Replace names of earlier phases by their models; the critic starts from a reward model, if there is one."""

    def folder(path: str) -> str:
        return path if "/" in path else str(run.model(path))

    rewards = [
        source.model_copy(update={"path": folder(source.path)}) if source.is_model else source
        for source in phase.rewards
    ]
    named = {key: folder(path) for key, path in phase.named_models.items()}
    if "critic" in RECIPES[phase.recipe].roles:
        named["critic"] = folder(phase.critic_start) if phase.critic_start else phase.model.path
    return phase.with_models(named, rewards)


def _export(group: Group, checkpoint: StoragePath, out: StoragePath) -> None:
    results(group.call("export", str(checkpoint), str(out)), _EXPORT_S)
