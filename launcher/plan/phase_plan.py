"""The plan of one phase on given hardware: the memory of its workers, whether it fits, the time and the cost.

Memory by training/estimate/memory.py, time by launcher/plan/step_time.py, machines by launcher/plan/hardware.py;
here they are put together for a phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.jobfile.job import Job
from launcher.plan import step_time
from launcher.plan.hardware import HardwareProfile
from launcher.plan.step_time import Seated, Work
from launcher.plan.workload import rows_in, work_of
from training.config import Phase
from training.estimate.memory import Models, Needs, Setting, checkpoint_bytes, models_of, recomputes, setting_of, team
from training.estimate.model_traits import known_of
from training.estimate.parameters import Shape, of_count, shape_of
from training.process.cpu_features import cpu_multiplies_bf16
from training.recipes import RECIPES
from training.schedule import total_steps

GIB = 1 << 30
_TIGHT_ABOVE = 0.92
"""Of a GPU's memory: the figures are right to a tenth."""
_EXPORT_BYTES = 2
"""A parameter of the model that a phase ends with."""
Verdict = Literal["fits", "tight", "does not fit"]
FITS: Verdict = "fits"
TIGHT: Verdict = "tight"
TOO_LARGE: Verdict = "does not fit"
BY_DEGREE: list[Verdict] = [FITS, TIGHT, TOO_LARGE]


@dataclass(frozen=True)
class PlanInputs:
    """What the command line adds to what is known."""

    rows: int | None = None
    tokens: float | None = None
    response: float | None = None
    parameters: int | None = None
    gpus: tuple[int, ...] = ()


class Shapes:
    """The shapes of a job's models, each read once."""

    def __init__(self, job: Job, parameters: int | None):
        self.job = job
        self.given = of_count(parameters) if parameters is not None else None
        self.known: dict[str, Shape] = {}

    def of(self, path: str) -> Shape:
        if self.given is not None:
            return self.given
        if path in self.job.phases:
            path = self.job.phases[path].model.path
        if path not in self.known:
            revisions = (phase.model.revision for phase in self.job.phases.values() if phase.model.path == path)
            self.known[path] = shape_of(path, revision=next(revisions, None))
        return self.known[path]

    def models(self, phase: Phase) -> Models:
        return models_of(phase, self.of)

    @property
    def notes(self) -> list[str]:
        return [shape.note for shape in ([self.given] if self.given else self.known.values()) if shape is not None]


class PhasePlan:
    """One phase on a site."""

    def __init__(
        self,
        name: str,
        phase: Phase,
        models: Models,
        site: HardwareProfile,
        asked: PlanInputs,
        work: Work | None = None,
        *,
        alone: bool,
    ):
        self.name, self.phase, self.models, self.site, self.asked = name, phase, models, site, asked
        self.alone = alone
        """Whether it is the only phase of its job."""
        self.work = work or work_of(phase, rows=asked.rows, tokens=asked.tokens, response=asked.response)
        self.machine = site.for_workers(phase.num_workers)
        self.dtype: Any = phase.model.dtype
        if self.dtype == "auto":
            self.dtype = "bf16" if site.on_gpu or cpu_multiplies_bf16() else "fp32"
        self.groups = [Seated(roles, self._where(roles, seated)) for roles, seated in phase.placements]
        self.needs = [team(phase, group.roles or (), models, group.where) for group in self._named()]

    def _where(self, roles: Sequence[str], seated: Phase) -> Setting:
        where = setting_of(seated, dtype=self.dtype, on_gpu=self.site.on_gpu, known=known_of(self.phase))
        again = recomputes(self.phase, roles, self.models, where, self.machine.gpu.memory_gib * GIB)
        return replace(where, checkpointing=again)

    def _named(self) -> list[Seated]:
        """The groups with their roles by name."""
        roles = tuple(RECIPES[self.phase.recipe].roles)
        return [group if group.roles else replace(group, roles=roles) for group in self.groups]

    def changed(self, **changes: Any) -> PhasePlan:
        """The same phase with other settings. Its data is not looked at again."""
        return PhasePlan(
            self.name,
            self.phase.model_copy(update=changes),
            self.models,
            self.site,
            self.asked,
            self.work,
            alone=self.alone,
        )

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict:
        """The verdict on the worst of its groups."""
        if self._missing_places:
            return TOO_LARGE
        return worst(self.verdict_of(group, needs) for group, needs in zip(self.groups, self.needs, strict=True))

    @property
    def _missing_places(self) -> str:
        """Describes that there are fewer GPUs than workers; empty if there are enough."""
        most = self.site.most_gpus
        if not self.site.on_gpu or most is None or self.phase.num_workers <= most:
            return ""
        return f"{self.phase.num_workers} workers, but at most {most} GPUs"

    def verdict_of(self, group: Seated, needs: Needs) -> Verdict:
        """Return the verdict on one of its groups."""
        gpu, machine = self.machine.gpu.memory_gib * GIB, self.machine.memory_gib * GIB
        on_device, host = sum(needs.device.values()), self._on_a_machine(group, needs)
        certain = on_device - needs.device["fragmentation"]
        if (self.site.on_gpu and certain > gpu) or (host > machine and not self.machine.memory_assumed):
            return TOO_LARGE
        near = (self.site.on_gpu and on_device > _TIGHT_ABOVE * gpu) or host > _TIGHT_ABOVE * machine
        return TIGHT if near else FITS

    def _on_a_machine(self, group: Seated, needs: Needs) -> float:
        """Return the bytes of a machine's memory that all workers of the phase on it need."""
        if not self.site.on_gpu:
            return sum(sum(n.host.values()) * g.where.workers for g, n in zip(self.groups, self.needs, strict=True))
        return sum(needs.host.values()) * min(group.where.workers, self.machine.gpus)

    def why(self) -> Iterator[str]:
        """Yield descriptions of what does not fit."""
        if self._missing_places:
            yield self._missing_places
        for group, needs in zip(self.groups, self.needs, strict=True):
            who = f"{', '.join(group.roles)}: " if group.roles else ""
            limit = self.machine.gpu.memory_gib
            if self.site.on_gpu and sum(needs.device.values()) - needs.device["fragmentation"] > limit * GIB:
                parts = ", ".join(f"{what} {size / GIB:,.1f}" for what, size in needs.device.most_common(4))
                yield (
                    f"{who}needs {sum(needs.device.values()) / GIB:,.1f} GiB of each GPU ({parts} ...), "
                    f"but {_article(self.machine.gpu.name)} has {limit:g}"
                )
            host = self._on_a_machine(group, needs)
            if host > self.machine.memory_gib * GIB and not self.machine.memory_assumed:
                there = self.machine.memory_gib
                yield f"{who}needs {host / GIB:,.1f} GiB of memory per machine, but a machine has {there:,.1f}"

    # -- time and money ------------------------------------------------------------------------------------------------

    @property
    def parts_s(self) -> dict[str, float] | None:
        """Seconds of the parts of a step that begins with responses of the model; None for others."""
        if self.phase.rollout is None:
            return None
        return step_time.iteration_s(self.phase, self.models, self._named(), self.machine, self.work)

    @property
    def step_s(self) -> float:
        if (parts := self.parts_s) is not None:
            return sum(parts.values())
        (group,) = self.groups
        return step_time.step_s(self.models.trained, group.where, self.machine, self.phase.batch, self.work.tokens)

    @property
    def steps(self) -> int | None:
        if self.phase.max_steps is not None:
            return self.phase.max_steps
        return total_steps(self.phase, self.work.rows) if self.work.rows else None

    @property
    def machines(self) -> int:
        return math.ceil(self.phase.num_workers / self.machine.gpus)

    def saving(self) -> float:
        return step_time.saving_s(self.phase, self.models, self.phase.num_workers, self.machine)

    def time(self) -> dict[str, Any]:
        """Seconds are what is most likely; ranges are those of pace.LOW and pace.HIGH."""
        step = self.step_s
        tokens = self.phase.step_sequences * (self.work.tokens + self.work.response)
        useful = step_time.useful_flops(
            self.models.trained,
            tokens,
            self.work.tokens + self.work.response,
            adapters=self.phase.model.lora is not None,
        )
        mfu = useful / (step * self.phase.num_workers * self.machine.gpu.tflops * 1e12)
        told: dict[str, Any] = {
            "step_s": step, "range": [step * step_time.LOW, step * step_time.HIGH], "tokens_per_s": tokens / step,
            "steps": self.steps,
            "mfu": mfu if self.site.on_gpu and self.phase.rollout is None else None,
            "parts_s": self.parts_s,
        }  # fmt: skip
        if self.steps is None:
            return told
        start = step_time.starting_s(self.models, self.machine) if self.site.on_gpu else 30.0
        evaluations = self._evaluations(self.steps)
        seconds = start + self.steps * step + evaluations
        hours = [seconds * factor / 3600 for factor in (step_time.LOW, 1.0, step_time.HIGH)]
        price = None if self.site.price is None else self.site.price * self.machines + self.site.head_price
        return told | {
            "hours": hours,
            "start_s": start,
            "evaluations_s": evaluations,
            "cost": None if price is None else [each * price for each in hours],
            "kwh": [each * step_time.kilowatts(self.phase.num_workers, self.machine) for each in hours],
        }

    def _evaluations(self, steps: int) -> float:
        """Seconds of all answers to the questions of `phase.eval`, as far as their number is known."""
        asked = self.phase.eval
        if asked is None:
            return 0.0
        count = min(filter(None, (asked.limit, rows_in(asked.data))), default=0)
        times = steps // self.phase.eval_every + 1 if self.phase.eval_every is not None else 1
        where = self.groups[0].where
        each = step_time.writing_s(
            self.models.trained, self.machine, responses=count * asked.samples, prompt=self.work.tokens,
            response=asked.max_new_tokens,
            copies=where.workers, batch=asked.batch, bytes_each=where.bytes,
        )  # fmt: skip
        return times * each if count else 0.0

    def checkpoint(self) -> dict[str, Any]:
        """Its size, how long one takes, whether the step in hand and one fit into the notice
        before a machine is taken back."""
        size, seconds, settings = checkpoint_bytes(self.phase, self.models), self.saving(), self.phase.checkpoint
        notice = self.site.machine.notice_s if self.site.spot else None
        lora = self.phase.model.lora is not None
        model = 0 if lora else _EXPORT_BYTES * self.models.trained.parameters
        # Beside those that are kept, the one that is being written, and the best;
        # without the two moments a third is left.
        best = 0 if settings.best is None else size // 3 if settings.keep_weights else size
        disk = size * (settings.keep + 1) + size // 3 * settings.keep_weights + best + model
        return {
            "bytes": size, "disk_bytes": disk, "seconds": seconds, "notice_s": notice,
            "within_notice": None if notice is None else seconds + self.step_s * step_time.HIGH <= notice,
        }  # fmt: skip


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=BY_DEGREE.index)


def gib(size: float) -> float:
    return size / GIB


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AHLR' else 'a'} {name}"
