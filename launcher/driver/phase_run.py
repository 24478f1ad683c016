"""Hooks of one running phase: they record its metrics and events and decide when it stops."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.driver import checkpoint_quota, trackers
from launcher.driver.budget import Budget
from launcher.driver.open_run import OpenRun
from launcher.driver.progress import PhaseProgress
from launcher.driver.signals import Interrupts
from launcher.jobfile.job import Job, job_hash
from launcher.plan import hardware, plan
from launcher.runfolder import run_folder, save_request
from launcher.workers.stragglers import Stragglers
from launcher.workers.worker_set import WorkerSet
from training.checkpoint.repository import opened
from training.errors import InputError
from training.metric_schema import with_old_names
from training.phase_info import PhaseInfo
from training.storage import StoragePath

_NEARLY_FULL = 0.95
"""Fraction of a GPU's memory above which a warning is given."""
_NOT_FOR_TRACKERS = ("step", "attempt", "workers")


class PhaseRun:
    """The hooks that a recipe's driver calls while it runs one phase (`Hooks` of training/drivers/hooks.py)."""

    def __init__(
        self, run: OpenRun, job: Job, name: str, interrupts: Interrupts, budget: Budget, progress: PhaseProgress,
        worker_set: WorkerSet,
        skipped: frozenset[int],
    ):  # fmt: skip
        self.run, self.name, self.interrupts, self.budget, self.progress, self.worker_set = (
            run,
            name,
            interrupts,
            budget,
            progress,
            worker_set,
        )
        self.job = job
        self.skipped = skipped
        self.step = self.saved_step = 0
        self.training = False
        self.stragglers = Stragglers()
        self.told_full: set[int] = set()
        self.folder = run.phase(name)
        self.job_hash = job_hash(job)
        self.job_hash_before = job_hash(job, as_written=True)
        self.resume_at = run.rewound_to().get(name)
        self.accepted_before = run.accepted_before()
        self.checkpoints = opened(run.checkpoints(name), run.attempt)
        self.profiles = run.profiles(name)
        self.trackers = trackers.open_all(
            job.track, job.name, name, self.folder, job.phases[name].model_dump(), progress.say
        )

    def log(self, row: Mapping[str, Any]) -> None:
        written = with_old_names(row)
        self.run.files.append(self.folder / run_folder.METRICS, {**written, "attempt": self.run.attempt})
        self.step = row["step"]
        self.progress.row(row)
        numbers = {name: value for name, value in written.items() if name not in _NOT_FOR_TRACKERS}
        for tracker in self.trackers:
            tracker.log(row["step"], numbers)

    def answers(self, step: int, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self.folder / run_folder.ANSWERS / f"{kind.replace('_', '-')}step-{step:08d}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.run.files.replace(path, text, new_folder=True)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.run.files.append(self.folder / run_folder.SAMPLES, {"step": step, **row})

    def paces(self, seconds_a_token: Sequence[float]) -> None:
        for rank, times in self.stragglers.look(seconds_a_token).items():
            machine = self.worker_set.members()[rank]["machine"]
            self.warn(
                f"worker {rank} on {machine} is {times:.1f} times as slow as the other workers, which wait for it"
            )

    def gpus_full(self, fractions: Sequence[float]) -> None:
        for rank, fraction in enumerate(fractions):
            if fraction >= _NEARLY_FULL and rank not in self.told_full:
                self.told_full.add(rank)
                machine = self.worker_set.members()[rank]["machine"]
                self.warn(
                    f"worker {rank} on {machine} uses {fraction:.0%} of its GPU's memory; a longer batch may run out "
                    "of memory. Lower micro_tokens, set gradient_checkpointing, or raise sharding.stage"
                )

    def warn(self, what: str) -> None:
        self.event("warning", what=what)
        self.progress.say(f"{self.name}: {what}")

    def event(self, kind: str, **fields: Any) -> None:
        self.run.event(kind, phase=self.name, **fields)
        if kind == "checkpoint_damaged":
            self.progress.say(f"{fields['finding']}; trying the previous checkpoint")
        elif kind == "checkpoint_set_aside":
            self.progress.say(f"{self.name}: set aside the checkpoint of step {fields['step']}")
        elif kind == "save_failed":
            self.progress.say(
                f"saving the checkpoint of step {fields['step']} failed ({fields['error']}); retrying once"
            )
        elif kind == "checkpoint":
            self.saved_step = fields["step"]
            self.worker_set.saved()
        elif kind == "profiled":
            self.progress.say(
                f"{self.name}: profile {{steps: {fields['steps']}}} of {fields['worker']}: {fields['summary']}; "
                f"{fields['table']}"
            )
        elif kind == "profile_failed":
            self.progress.say(f"{self.name}: profile {{steps: {fields['steps']}}} failed: {fields['error']}")
        elif kind == "reached":
            self.progress.say(f"{self.name}: stopping after step {fields['step']}: {fields['what']}")
        elif kind == "restored":
            self.step = self.saved_step = fields["step"]
            self.progress.say(f"{self.name}: resuming after step {fields['step']}")

    def flush(self) -> None:
        self.run.flush()

    def started(self, info: PhaseInfo, step: int, *, evaluates: bool = False) -> None:
        for note in info.notes:
            self.progress.say(f"{self.name}: {note}")
        more = ", Liger kernels" if info.kernels == "liger" else ""
        more += ", activations recomputed" if info.recomputes else ""
        self.progress.say(
            f"{self.name}: {info.num_parameters:,} parameters, {info.dtype} on {info.device}, {info.attention} "
            f"attention{more}; {info.num_samples:,} samples, {info.total_steps:,} steps"
        )
        redone_s = self._forget_after(step, evaluates=evaluates)
        self.event(
            "training", step=step, redone_s=redone_s, total_steps=info.total_steps, parameters=info.num_parameters,
            samples=info.num_samples,
            dtype=info.dtype, device=info.device, attention=info.attention, kernels=info.kernels,
            recomputes=info.recomputes,
            notes=info.notes,
        )  # fmt: skip
        self._note_plan(info)
        self.step, self.training = step, True
        self.interrupts.training = True
        self.progress.start(info.total_steps, step)

    def _note_plan(self, info: PhaseInfo) -> None:
        """Record the plan for `muster status`. Unknown machines or models have no plan."""
        members = self.worker_set.members()
        fullest = max(Counter(member["machine"] for member in members).values())
        try:
            where = hardware.of_device(info.device, fullest)
            expected = plan.expected(self.job, self.name, info, len(members), where, self.worker_set.price())
        except InputError:
            return
        except Exception as error:  # a defect of the plan is no reason to stop the training
            self.warn(f"this phase cannot be planned ({error!r})")
            return
        self.event("planned", **expected)

    def _forget_after(self, step: int, *, evaluates: bool) -> float:
        """Remove the rows of steps that will be repeated, so that the file has each step once.
        Returns the seconds that those steps took."""
        forgotten_s = 0.0
        self.run.files.flush()
        for path in (self.folder / run_folder.METRICS, self.folder / run_folder.SAMPLES):
            rows = list(run_folder.json_rows(path))
            kept = [row for row in rows if row["step"] <= step and step > 0]
            if evaluates:
                kept = [row for row in kept if row["step"] < step or "evaluation_s" not in row]
            if len(kept) < len(rows):
                forgotten_s += sum(row.get("step_s", 0.0) for row in rows if row["step"] > step)
                self.run.files.replace(path, "".join(json.dumps(row) + "\n" for row in kept))
        return round(forgotten_s, 3)

    def make_room(self, best: StoragePath | None) -> None:
        if self.job.quota_bytes is None or not (
            excess := checkpoint_quota.make_room(self.run, self.job, self.name, best)
        ):
            return
        fields = {"phase": self.name, "quota": self.job.checkpoint_quota}
        if any(event["event"] == "quota_exceeded" and fields.items() <= event.items() for event in self.run.events()):
            return
        self.event("quota_exceeded", quota=self.job.checkpoint_quota, bytes=excess)
        self.progress.say(
            f"{self.name}: checkpoint_quota {self.job.checkpoint_quota} is exceeded: the checkpoints that must be kept "
            f"and the next one need {excess / 1e9:,.2f} GB more"
        )

    def save_requested(self, step: int) -> bool:
        if (identity := save_request.take(self.run)) is None:
            return False
        self.event("save_requested", step=step, id=identity)
        self.progress.say(f"{self.name}: saving step {step}, as requested by `muster save`")
        return True

    def clock(self) -> float:
        return time.monotonic()

    def stop_requested(self) -> bool:
        self.budget.count()
        return (
            self.interrupts.requested or self.budget.reached is not None or self.worker_set.reason_to_move() is not None
        )

    def step_in_hand(self) -> int:
        """Return the step in progress, or the last finished step if there is none."""
        return max(self.step + 1, self.worker_set.step_in_hand()) if self.training else self.step

    def close(self) -> None:
        self.interrupts.training = False
        self.progress.close()
        self.checkpoints.close()
        for tracker in self.trackers:
            tracker.close()
