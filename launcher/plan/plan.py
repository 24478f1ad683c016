"""`muster plan`: estimates memory, time and cost of a job before you rent GPUs: whether it fits, and if not, which
smallest change makes it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.jobfile.job import Job
from launcher.plan import step_time
from launcher.plan.alternatives import changes, layouts, stages
from launcher.plan.hardware import HardwareProfile
from launcher.plan.phase_plan import TOO_LARGE, PhasePlan, PlanInputs, Shapes, gib, worst
from launcher.plan.step_time import Work
from training.config import Phase
from training.errors import InputError, Problem
from training.estimate.memory import Models, checkpoint_bytes
from training.estimate.parameters import shape_of
from training.phase_info import PhaseInfo


def plan(job: Job, site: HardwareProfile, asked: PlanInputs = PlanInputs()) -> dict[str, Any]:
    """Return the whole plan. Raises InputError if too little is known of a model."""
    shapes = Shapes(job, asked.parameters)
    phases = {
        name: PhasePlan(name, phase, shapes.models(phase), site, asked, alone=len(job.phases) == 1)
        for name, phase in job.phases.items()
    }
    told = {name: _told(planned) for name, planned in phases.items()}
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


def refuse_what_cannot_fit(job: Job, site: HardwareProfile) -> None:
    """Raises InputError for phases that run out of memory by the plan, with a change that would fit."""
    shapes = Shapes(job, None)
    problems = []
    for name, phase in job.phases.items():
        try:
            planned = PhasePlan(
                name,
                phase,
                shapes.models(phase),
                site,
                PlanInputs(rows=0, tokens=1.0, response=1.0),
                alone=len(job.phases) == 1,
            )
        except InputError:
            continue  # a model of which nothing is known yet
        if planned.verdict == TOO_LARGE:
            reasons = "; ".join(planned.why())
            fitting = changes(planned)
            advice = f"it would fit with {fitting[0]}" if fitting else "no single change makes it fit"
            problems.append(
                Problem(
                    str(job.file),
                    f"phases.{name}",
                    f"{reasons}; {advice} (see `muster plan`; --force runs it anyway)",
                )
            )
    if problems:
        raise InputError(problems)


def checkpoint_bytes_of(phase: Phase) -> int:
    """Return the bytes of one checkpoint of a phase. Raises InputError if its models are not local folders."""
    shape = shape_of(phase.model.path, revision=phase.model.revision)
    named = phase.named_models.get("critic")
    critic = shape_of(named).as_classifier if named else None
    return checkpoint_bytes(phase, Models(shape, critic))


def _told(planned: PhasePlan) -> dict[str, Any]:
    """Of one phase."""
    work, verdict = planned.work, planned.verdict
    groups = [
        {
            "roles": list(group.roles), "workers": group.where.workers, "stage": group.where.stage,
            "offload": group.where.sharding.offload, "recomputes": group.where.checkpointing,
            "device": dict(needs.device), "host": dict(needs.host),
            "verdict": planned.verdict_of(group, needs),
        }
        for group, needs in zip(planned.groups, planned.needs, strict=True)
    ]  # fmt: skip
    return {
        "recipe": planned.phase.recipe, "workers": planned.phase.num_workers, "dtype": planned.dtype,
        "verdict": verdict, "groups": groups,
        "why": list(planned.why()), "changes": changes(planned) if verdict == TOO_LARGE else [],
        "alternatives": stages(planned),
        "layouts": layouts(planned), "time": planned.time(), "checkpoint": planned.checkpoint(),
        "work": {"rows": work.rows, "tokens": work.tokens, "response": work.response},
    }  # fmt: skip


def _machine(site: HardwareProfile) -> dict[str, Any]:
    gpu = site.machine.gpu
    return {
        "name": site.machine.name, "gpu": gpu.name if site.on_gpu else None,
        "gpus": site.machine.gpus if site.on_gpu else 0,
        "memory_gib": gpu.memory_gib if site.on_gpu else site.machine.memory_gib, "host_gib": site.machine.memory_gib,
        "price": site.price,
        "spot": site.at_spot_price, "prices_of": site.machine.dated, "host_assumed": site.machine.memory_assumed,
    }  # fmt: skip


def _summed(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the sums over all phases; None if the number of steps of one is unknown."""
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
    """Yield the limits that the job will or may reach before its end."""
    if total is None:
        return
    for name, limit, found in (("max_hours", job.max_hours, total["hours"]), ("max_cost", job.max_cost, total["cost"])):
        if limit is not None and found is not None and found[2] > limit:
            how = "will" if found[0] > limit else "may"
            yield f"{name} is {limit:g}: the job {how} reach it and stop before its end"


def _at(job: Job, phases: Mapping[str, PhasePlan], count: int) -> dict[str, Any]:
    """Return the plan of the job with `count` GPUs; groups of PPO keep their proportions as nearly as possible."""
    planned = {name: each.changed(**each.phase.resized(count)) for name, each in phases.items()}
    dealt = [each.phase.batch >= max(group.where.workers for group in each.groups) for each in planned.values()]
    told: dict[str, dict[str, Any]] = {name: {"time": each.time()} for name, each in planned.items()}
    first = next(iter(told.values()))["time"]
    gpus = max(each.phase.num_workers for each in planned.values())
    return {
        "gpus": gpus,
        "step_s": first["step_s"],
        "tokens_per_s": first["tokens_per_s"],
        "total": _summed(told),
        "verdict": worst(each.verdict for each in planned.values())
        if all(dealt)
        else "batch is smaller than the number of workers",
    }


def expected(
    job: Job, name: str, info: PhaseInfo, workers: int, site: HardwareProfile, price: float | None
) -> dict[str, Any]:
    """Return the plan that a run records for a phase once its data and machines are known, to compare it with the
    measurements.

    `price`: of the machines per hour, from their labels. Raises InputError if a model is not known.
    """
    phase = job.phases[name]
    if not phase.has_sized_groups:
        phase = phase.model_copy(update={"resources": phase.resources.model_copy(update={"workers": workers})})
    work = Work(rows=info.num_samples, tokens=info.mean_tokens, response=float(phase.new_tokens))
    planned = PhasePlan(name, phase, Shapes(job, None).models(phase), site, PlanInputs(), work, alone=True)
    needs = max(planned.needs, key=lambda each: sum(each.device.values()) or sum(each.host.values()))
    step = planned.step_s
    return {
        "workers": workers, "step_s": step, "range": [step * step_time.LOW, step * step_time.HIGH],
        "hours": info.total_steps * step / 3600,
        "memory_gib": gib(sum(needs.device.values()) or sum(needs.host.values())), "price": price,
    }  # fmt: skip
