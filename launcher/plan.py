"""`muster plan`: what a job needs of memory, time and money, before anybody pays. Whether it fits, and if not the smallest change that does.

Memory by training/sizing.py, time by launcher/pace.py, machines by launcher/site.py; here they are put together for a job.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher import pace
from launcher.job import Job
from launcher.pace import Seated, Work
from launcher.site import Site
from launcher.workload import rows_in, work_of
from training.config import PPO, PPO_ROLES, Lora, Phase, Placement, Sharding
from training.errors import InputError, Problem
from training.facts import Facts
from training.hardware import cpu_multiplies_bf16
from training.schedule import total_steps
from training.shape import Shape, of_count, shape_of
from training.sizing import Models, Needs, Setting, checkpoint_bytes, models_of, recomputes, setting_of, team

GIB = 1 << 30
_TIGHT_ABOVE = 0.92
"""Of a GPU's memory: the figures are right to a tenth."""
_EXPORT_BYTES = 2
"""A parameter of the model that a phase ends with."""
_MOST_WORKERS = 1024
Verdict = Literal["fits", "tight", "does not fit"]
FITS: Verdict = "fits"
TIGHT: Verdict = "tight"
TOO_LARGE: Verdict = "does not fit"
_BY_DEGREE: list[Verdict] = [FITS, TIGHT, TOO_LARGE]


@dataclass(frozen=True)
class Asked:
    """What the command line adds to what is known."""

    rows: int | None = None
    tokens: float | None = None
    response: float | None = None
    parameters: int | None = None
    gpus: tuple[int, ...] = ()


def plan(job: Job, site: Site, asked: Asked = Asked()) -> dict[str, Any]:
    """The whole plan. Raises InputError if a model is not known well enough."""
    shapes = _Shapes(job, asked.parameters)
    phases = {
        name: _Planned(name, phase, shapes.models(phase), site, asked, alone=len(job.phases) == 1)
        for name, phase in job.phases.items()
    }
    told = {name: planned.told() for name, planned in phases.items()}
    return {
        "name": job.name,
        "machine": _machine(site),
        "phases": told,
        "fits": all(phase["verdict"] != TOO_LARGE for phase in told.values()),
        "total": _summed(told),
        "limits": list(_limits(job, _summed(told))),
        "scaling": [_at(job, phases, count) for count in asked.gpus],
        "notes": list(filter(None, [site.note, *shapes.notes]))
        + [f"{name}: {p.work.note}" for name, p in phases.items() if p.work.note],
    }


def refuse_what_cannot_fit(job: Job, site: Site) -> None:
    """Raises InputError for phases whose workers cannot hold what they must, with what would fit."""
    shapes = _Shapes(job, None)
    problems = []
    for name, phase in job.phases.items():
        try:
            planned = _Planned(
                name,
                phase,
                shapes.models(phase),
                site,
                Asked(rows=0, tokens=1.0, response=1.0),
                alone=len(job.phases) == 1,
            )
        except InputError:
            continue  # a model of which nothing is known yet
        if planned.verdict == TOO_LARGE:
            told = "; ".join(planned.why())
            fitting = planned.changes()
            advice = f"it would fit with {fitting[0]}" if fitting else "nothing that a plan knows makes it fit"
            problems.append(
                Problem(
                    str(job.file),
                    f"phases.{name}",
                    f"{told}; {advice} (`muster plan` shows more, --force runs it all the same)",
                )
            )
    if problems:
        raise InputError(problems)


def checkpoint_bytes_of(phase: Phase) -> int:
    """Of one checkpoint of a phase whose models are folders. Raises InputError if they are not known."""
    shape = shape_of(phase.model.path)
    critic = shape_of(phase.critic).as_classifier if isinstance(phase, PPO) and phase.critic else None
    return checkpoint_bytes(phase, Models(shape, critic))


class _Shapes:
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
            self.known[path] = shape_of(path)
        return self.known[path]

    def models(self, phase: Phase) -> Models:
        return models_of(phase, self.of)

    @property
    def notes(self) -> list[str]:
        return [shape.note for shape in ([self.given] if self.given else self.known.values()) if shape is not None]


class _Planned:
    """One phase on a site."""

    def __init__(
        self,
        name: str,
        phase: Phase,
        models: Models,
        site: Site,
        asked: Asked,
        work: Work | None = None,
        *,
        alone: bool,
    ):
        self.name, self.phase, self.models, self.site, self.asked = name, phase, models, site, asked
        self.alone = alone
        """The only phase of its job."""
        self.work = work or work_of(phase, rows=asked.rows, tokens=asked.tokens, response=asked.response)
        self.machine = site.for_workers(phase.num_workers)
        self.dtype: Any = phase.model.dtype
        if self.dtype == "auto":
            self.dtype = "bf16" if site.on_gpu or cpu_multiplies_bf16() else "fp32"
        self.groups = [Seated(roles, self._where(roles, seated)) for roles, seated in phase.teams]
        self.needs = [team(phase, group.roles or (), models, group.where) for group in self._named()]

    def _where(self, roles: Sequence[str], seated: Phase) -> Setting:
        where = setting_of(seated, dtype=self.dtype, on_gpu=self.site.on_gpu)
        again = recomputes(self.phase, roles, self.models, where, self.machine.gpu.memory_gib * GIB)
        return replace(where, checkpointing=again)

    def _named(self) -> list[Seated]:
        """The groups with their roles by name."""
        roles = PPO_ROLES if isinstance(self.phase, PPO) else ("trainer",)
        return [group if group.roles else replace(group, roles=roles) for group in self.groups]

    def changed(self, **changes: Any) -> _Planned:
        """The same phase with other settings. Its data is not looked at again."""
        return _Planned(
            self.name,
            self.phase.model_copy(update=changes),
            self.models,
            self.site,
            self.asked,
            self.work,
            alone=self.alone,
        )

    # -- memory ---------------------------------------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict:
        """Of the worst of its groups."""
        if self._missing_places:
            return TOO_LARGE
        return _worst(self._verdict(group, needs) for group, needs in zip(self.groups, self.needs, strict=True))

    @property
    def _missing_places(self) -> str:
        """That there are fewer GPUs than workers, in words."""
        most = self.site.most_gpus
        if not self.site.on_gpu or most is None or self.phase.num_workers <= most:
            return ""
        return f"{self.phase.num_workers} workers, there are {most} GPUs at most"

    def _verdict(self, group: Seated, needs: Needs) -> Verdict:
        gpu, machine = self.machine.gpu.memory_gib * GIB, self.machine.memory_gib * GIB
        on_device, host = sum(needs.device.values()), self._on_a_machine(group, needs)
        certain = on_device - needs.device["fragmentation"]
        if (self.site.on_gpu and certain > gpu) or (host > machine and not self.machine.memory_assumed):
            return TOO_LARGE
        near = (self.site.on_gpu and on_device > _TIGHT_ABOVE * gpu) or host > _TIGHT_ABOVE * machine
        return TIGHT if near else FITS

    def _on_a_machine(self, group: Seated, needs: Needs) -> float:
        """Of its memory, by all workers of the phase that are on it."""
        if not self.site.on_gpu:
            return sum(sum(n.host.values()) * g.where.workers for g, n in zip(self.groups, self.needs, strict=True))
        return sum(needs.host.values()) * min(group.where.workers, self.machine.gpus)

    def why(self) -> Iterator[str]:
        """What does not fit, in words."""
        if self._missing_places:
            yield self._missing_places
        for group, needs in zip(self.groups, self.needs, strict=True):
            who = f"{', '.join(group.roles)}: " if group.roles else ""
            limit = self.machine.gpu.memory_gib
            if self.site.on_gpu and sum(needs.device.values()) - needs.device["fragmentation"] > limit * GIB:
                parts = ", ".join(f"{what} {size / GIB:,.1f}" for what, size in needs.device.most_common(4))
                yield f"{who}needs {sum(needs.device.values()) / GIB:,.1f} GiB of each GPU ({parts} ...), {_article(self.machine.gpu.name)} has {limit:g}"
            host = self._on_a_machine(group, needs)
            if host > self.machine.memory_gib * GIB and not self.machine.memory_assumed:
                yield f"{who}needs {host / GIB:,.1f} GiB of memory on a machine, there are {self.machine.memory_gib:,.1f}"

    def changes(self) -> list[str]:
        """Single changes that make it fit, as they are written on the command line, what disturbs least first and those that are
        tight last; pairs if there are none."""
        single = list(self._possible())
        found = [(self.changed(**changes).verdict, words) for words, changes in single]
        if all(verdict == TOO_LARGE for verdict, _ in found):
            pairs = ((a, b) for index, a in enumerate(single) for b in single[index + 1 :])
            apart = ((a, b) for a, b in pairs if not a[1].keys() & b[1].keys())
            found = [(self.changed(**a[1], **b[1]).verdict, f"{a[0]} {b[0]}") for a, b in apart]
        fitting = [words for verdict, words in found if verdict == FITS]
        return fitting + [f"{words} (tight)" for verdict, words in found if verdict == TIGHT][: 3 if fitting else 6]

    def _possible(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes of a phase, what disturbs least first."""
        phase, model, own = self.phase, self.phase.model, self._own
        if model.gradient_checkpointing is False:
            yield (
                f"{own}model.gradient_checkpointing=true",
                {"model": model.model_copy(update={"gradient_checkpointing": True})},
            )
        yield from self._smaller("micro_batch", phase.micro_batch)
        longest = phase.data.max_length + phase.new_tokens
        if phase.micro_batch is None and self.groups[0].where.micro_tokens > longest:
            yield f"phases.{self.name}.micro_tokens={longest}", {"micro_tokens": longest}
        if isinstance(phase, PPO) and phase.generation == "batched":
            yield from self._smaller("generation_batch", phase.generation_batch)
        if not (isinstance(phase, PPO) and phase.groups is not None):
            for stage in range(phase.sharding.stage + 1, 3 if model.compile else 4):
                yield f"{own}sharding.stage={stage}", {"sharding": phase.sharding.model_copy(update={"stage": stage})}
            yield from self._more_workers()
        if phase.sharding.offload == "none" and self.site.on_gpu:
            stage = phase.sharding.stage or 2
            yield (
                f"'{own}sharding={{stage: {stage}, offload: cpu}}'",
                {"sharding": Sharding(stage=stage, offload="cpu")},
            )
        if model.lora is None:
            yield f"'{own}model.lora={{rank: 16}}'", {"model": model.model_copy(update={"lora": Lora()})}
            if self.site.on_gpu and not model.compile:
                stage = min(2, phase.sharding.stage)
                changes = {"model": model.model_copy(update={"lora": Lora(bits=4)})}
                words = f"'{own}model.lora={{rank: 16, bits: 4}}'" + (
                    "" if stage == phase.sharding.stage else f" {own}sharding.stage={stage}"
                )
                yield words, {**changes, "sharding": phase.sharding.model_copy(update={"stage": stage})}

    @property
    def _own(self) -> str:
        """Before settings that a job may have at its top."""
        return "" if self.alone else f"phases.{self.name}."

    def _smaller(self, name: str, count: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """A count halved until it fits."""
        while count is not None and count > 1:
            count //= 2
            if self.changed(**{name: count}).verdict == FITS or count == 1:
                yield f"phases.{self.name}.{name}={count}", {name: count}
                return

    def _more_workers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The fewest workers that fit, in whole machines, if there are as many."""
        resources, step = self.phase.resources, self.machine.gpus if self.site.on_gpu else 1
        most = min(_MOST_WORKERS, self.phase.batch, self.site.most_gpus or _MOST_WORKERS)
        for count in range((resources.workers // step + 1) * step, most + 1, step):
            changes = {"resources": resources.model_copy(update={"workers": count})}
            if self.changed(**changes).verdict == FITS or (count == most and self.changed(**changes).verdict == TIGHT):
                yield f"{self._own}resources.workers={count}", changes
                return

    def alternatives(self) -> list[dict[str, Any]]:
        """The stages with and without offload, side by side."""
        rows = []
        stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
        for stage in stages:
            for offload in ("none", "cpu") if stage and self.site.on_gpu else ("none",):
                if stage == 3 and self.phase.model.lora is not None and self.phase.model.lora.bits:
                    continue
                other = self.changed(
                    sharding=Sharding(stage=stage, offload=offload),
                    **self._regrouped(Sharding(stage=stage, offload=offload)),
                )
                device, host = (
                    max(sum(getattr(needs, kind).values()) for needs in other.needs) for kind in ("device", "host")
                )
                rows.append(
                    {
                        "stage": stage, "offload": offload, "device_gib": _gib(device), "host_gib": _gib(host),
                        "verdict": other.verdict,
                    }
                )  # fmt: skip
        return rows

    def _regrouped(self, sharding: Sharding) -> dict[str, Any]:
        groups = getattr(self.phase, "groups", None)
        return (
            {} if groups is None else {"groups": [group.model_copy(update={"sharding": sharding}) for group in groups]}
        )

    def layouts(self) -> list[dict[str, Any]]:
        """Of PPO: who could sit where on the same GPUs, the fastest that fits first."""
        phase = self.phase
        if not isinstance(phase, PPO):
            return []
        found = []
        for words, groups in _layouts(phase):
            for stage in sorted({2, 3, phase.sharding.stage}):
                other = self.changed(groups=groups, sharding=Sharding(stage=stage, offload=phase.sharding.offload))
                seconds = sum(other.iteration().values())
                worst = max(sum(needs.device.values()) or sum(needs.host.values()) for needs in other.needs)
                found.append(
                    {
                        "layout": words,
                        "stage": stage,
                        "iteration_s": seconds,
                        "gib": _gib(worst),
                        "verdict": other.verdict,
                    }
                )
        return sorted(found, key=lambda each: (_BY_DEGREE.index(each["verdict"]), each["iteration_s"]))

    # -- time and money -------------------------------------------------------------------------------------------------

    def iteration(self) -> dict[str, float]:
        assert isinstance(self.phase, PPO)
        return pace.iteration_s(self.phase, self.models, self._named(), self.machine, self.work)

    @property
    def step_s(self) -> float:
        if isinstance(self.phase, PPO):
            return sum(self.iteration().values())
        (group,) = self.groups
        return pace.step_s(self.models.trained, group.where, self.machine, self.phase.batch, self.work.tokens)

    @property
    def steps(self) -> int | None:
        if self.phase.max_steps is not None:
            return self.phase.max_steps
        return total_steps(self.phase, self.work.rows) if self.work.rows else None

    @property
    def machines(self) -> int:
        return math.ceil(self.phase.num_workers / self.machine.gpus)

    def saving(self) -> float:
        return pace.saving_s(self.phase, self.models, self.phase.num_workers, self.machine)

    def time(self) -> dict[str, Any]:
        """Seconds are what is most likely; ranges are those of pace.LOW and pace.HIGH."""
        step = self.step_s
        samples = self.phase.step_samples * (self.phase.samples_per_prompt if isinstance(self.phase, PPO) else 1)
        tokens = samples * (self.work.tokens + self.work.response)
        useful = pace.useful_flops(
            self.models.trained,
            tokens,
            self.work.tokens + self.work.response,
            adapters=self.phase.model.lora is not None,
        )
        mfu = useful / (step * self.phase.num_workers * self.machine.gpu.tflops * 1e12)
        told: dict[str, Any] = {
            "step_s": step, "range": [step * pace.LOW, step * pace.HIGH], "tokens_per_s": tokens / step, "steps": self.steps,
            "mfu": mfu if self.site.on_gpu and not isinstance(self.phase, PPO) else None,
            "parts_s": self.iteration() if isinstance(self.phase, PPO) else None,
        }  # fmt: skip
        if self.steps is None:
            return told
        start = pace.starting_s(self.models, self.machine) if self.site.on_gpu else 30.0
        evaluations = self._evaluations(self.steps)
        seconds = start + self.steps * step + evaluations
        hours = [seconds * factor / 3600 for factor in (pace.LOW, 1.0, pace.HIGH)]
        price = None if self.site.price is None else self.site.price * self.machines + self.site.head_price
        return told | {
            "hours": hours,
            "start_s": start,
            "evaluations_s": evaluations,
            "cost": None if price is None else [each * price for each in hours],
            "kwh": [each * pace.kilowatts(self.phase.num_workers, self.machine) for each in hours],
        }

    def _evaluations(self, steps: int) -> float:
        """Seconds of all answers to the questions of `phase.eval`, as far as their number is known."""
        asked = self.phase.eval
        if asked is None:
            return 0.0
        count = min(filter(None, (asked.limit, rows_in(asked.data))), default=0)
        times = steps // self.phase.eval_every + 1 if self.phase.eval_every is not None else 1
        where = self.groups[0].where
        each = pace.writing_s(
            self.models.trained, self.machine, responses=count * asked.samples, prompt=self.work.tokens, response=asked.max_new_tokens,
            copies=where.workers, batch=asked.batch, bytes_each=where.bytes,
        )  # fmt: skip
        return times * each if count else 0.0

    def checkpoint(self) -> dict[str, Any]:
        """Its size, how long one takes, whether that is shorter than the notice before a machine is taken back."""
        size, seconds, keep = checkpoint_bytes(self.phase, self.models), self.saving(), self.phase.checkpoint.keep
        notice = self.site.machine.notice_s if self.site.spot else None
        lora = self.phase.model.lora is not None
        model = 0 if lora else _EXPORT_BYTES * self.models.trained.parameters
        # Beside those that are kept, the one that is being written, and the best.
        disk = size * (keep + 1 + (self.phase.checkpoint.best is not None)) + model
        return {
            "bytes": size, "disk_bytes": disk, "seconds": seconds, "notice_s": notice,
            "within_notice": None if notice is None else seconds + self.step_s * pace.HIGH <= notice,
        }  # fmt: skip

    def told(self) -> dict[str, Any]:
        verdict = self.verdict
        groups = [
            {
                "roles": list(group.roles), "workers": group.where.workers, "stage": group.where.stage,
                "offload": group.where.sharding.offload, "recomputes": group.where.checkpointing, "device": dict(needs.device), "host": dict(needs.host),
                "verdict": self._verdict(group, needs),
            }
            for group, needs in zip(self.groups, self.needs, strict=True)
        ]  # fmt: skip
        return {
            "recipe": self.phase.recipe, "workers": self.phase.num_workers, "dtype": self.dtype, "verdict": verdict, "groups": groups,
            "why": list(self.why()), "changes": self.changes() if verdict == TOO_LARGE else [], "alternatives": self.alternatives(),
            "layouts": self.layouts(), "time": self.time(), "checkpoint": self.checkpoint(),
            "work": {"rows": self.work.rows, "tokens": self.work.tokens, "response": self.work.response},
        }  # fmt: skip


def _layouts(phase: PPO) -> Iterator[tuple[str, list[Placement] | None]]:
    """Ways to seat the roles on as many workers as the phase has."""
    count = phase.num_workers
    half, quarter = count // 2, count // 4
    judged = any(source.is_model for source in phase.rewards)
    yield f"all roles on {count}", None
    if half:
        yield (
            f"policy, reference on {count - half}; critic, reward on {half}",
            [
                Placement(roles=["policy", "reference"], workers=count - half),
                Placement(roles=["critic", "reward"], workers=half),
            ],
        )
    if quarter:
        rest = count - half - quarter
        yield (
            f"policy, reference on {quarter}; critic, reward on {rest}; rollout on {half}",
            [
                Placement(roles=["policy", "reference"], workers=quarter), Placement(roles=["critic", "reward"], workers=rest),
                Placement(roles=["rollout"], workers=half),
            ],
        )  # fmt: skip
    if judged and count >= 8:
        eighth = count // 8
        yield (
            f"policy, critic on {half}; reference, reward on {2 * eighth}; rollout on {count - half - 2 * eighth}",
            [
                Placement(roles=["policy", "critic"], workers=half), Placement(roles=["reference", "reward"], workers=2 * eighth),
                Placement(roles=["rollout"], workers=count - half - 2 * eighth),
            ],
        )  # fmt: skip


def _machine(site: Site) -> dict[str, Any]:
    gpu = site.machine.gpu
    return {
        "name": site.machine.name, "gpu": gpu.name if site.on_gpu else None, "gpus": site.machine.gpus if site.on_gpu else 0,
        "memory_gib": gpu.memory_gib if site.on_gpu else site.machine.memory_gib, "host_gib": site.machine.memory_gib, "price": site.price,
        "spot": site.at_spot_price, "prices_of": site.machine.dated, "host_assumed": site.machine.memory_assumed,
    }  # fmt: skip


def _summed(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Over all phases; None if the steps of one are not known."""
    times = [phase["time"] for phase in phases.values()]
    if any("hours" not in each for each in times):
        return None
    costs = [each["cost"] for each in times]
    return {
        "hours": [sum(column) for column in zip(*(each["hours"] for each in times), strict=True)],
        "cost": None if None in costs else [sum(column) for column in zip(*costs, strict=True)],
        "kwh": [sum(column) for column in zip(*(each["kwh"] for each in times), strict=True)],
    }


def _limits(job: Job, total: Mapping[str, Any] | None) -> Iterator[str]:
    """Limits of the job that it may well reach before its end."""
    if total is None:
        return
    for name, limit, found in (("max_hours", job.max_hours, total["hours"]), ("max_cost", job.max_cost, total["cost"])):
        if limit is not None and found is not None and found[2] > limit:
            how = "will" if found[0] > limit else "may"
            yield f"{name} is {limit:g}: the job {how} stop there, before its end"


def _at(job: Job, phases: Mapping[str, _Planned], count: int) -> dict[str, Any]:
    """The job with so many GPUs, as nearly as groups of PPO can keep their proportions."""
    planned = {name: each.changed(**_resized(each.phase, count)) for name, each in phases.items()}
    dealt = [each.phase.batch >= max(group.where.workers for group in each.groups) for each in planned.values()]
    told: dict[str, dict[str, Any]] = {name: {"time": each.time()} for name, each in planned.items()}
    first = next(iter(told.values()))["time"]
    gpus = max(each.phase.num_workers for each in planned.values())
    return {
        "gpus": gpus, "step_s": first["step_s"], "tokens_per_s": first["tokens_per_s"], "total": _summed(told),
        "verdict": _worst(each.verdict for each in planned.values()) if all(dealt) else "batch is smaller than the workers",
    }  # fmt: skip


def _resized(phase: Phase, count: int) -> dict[str, Any]:
    if isinstance(phase, PPO) and phase.groups is not None:
        before = phase.num_workers
        return {
            "groups": [
                g.model_copy(update={"workers": max(1, round(g.workers * count / before))}) for g in phase.groups
            ]
        }
    return {"resources": phase.resources.model_copy(update={"workers": count, "min_workers": None})}


def expected(job: Job, name: str, facts: Facts, workers: int, site: Site, price: float | None) -> dict[str, Any]:
    """What a run notes of the plan for a phase, once its data and machines are known, to be compared with what comes.

    `price`: of the machines an hour, as they say it themselves. Raises InputError if a model is not known.
    """
    phase = job.phases[name]
    if not isinstance(phase, PPO) or phase.groups is None:
        phase = phase.model_copy(update={"resources": phase.resources.model_copy(update={"workers": workers})})
    response = float(phase.response_tokens) if isinstance(phase, PPO) else 0.0
    work = Work(rows=facts.num_samples, tokens=facts.mean_tokens, response=response)
    planned = _Planned(name, phase, _Shapes(job, None).models(phase), site, Asked(), work, alone=True)
    needs = max(planned.needs, key=lambda each: sum(each.device.values()) or sum(each.host.values()))
    step = planned.step_s
    return {
        "workers": workers, "step_s": step, "range": [step * pace.LOW, step * pace.HIGH], "hours": facts.total_steps * step / 3600,
        "memory_gib": _gib(sum(needs.device.values()) or sum(needs.host.values())), "price": price,
    }  # fmt: skip


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=_BY_DEGREE.index)


def _gib(size: float) -> float:
    return size / GIB


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AHLR' else 'a'} {name}"
