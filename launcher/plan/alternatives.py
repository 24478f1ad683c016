"""Alternatives for a phase on the same machines: changes that make it fit, other ZeRO stages, and other placements of
the roles of PPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from launcher.plan.phase_plan import BY_DEGREE, FITS, TIGHT, TOO_LARGE, PhasePlan, gib
from training.config import Lora, Sharding
from training.recipes import RECIPES, resolve

_MOST_WORKERS = 1024
_Change = tuple[str, dict[str, Any]]
"""The override as written on the command line; the settings of the phase that it replaces."""


def changes(planned: PhasePlan) -> list[str]:
    """Return single changes that make it fit, as command line overrides, the least intrusive first and tight ones last;
    pairs of changes if there are none."""
    single = list(_possible(planned))
    found = [(planned.changed(**settings).verdict, words) for words, settings in single]
    if all(verdict == TOO_LARGE for verdict, _ in found):
        pairs = ((a, b) for index, a in enumerate(single) for b in single[index + 1 :])
        apart = ((a, b) for a, b in pairs if not a[1].keys() & b[1].keys())
        found = [(planned.changed(**a[1], **b[1]).verdict, f"{a[0]} {b[0]}") for a, b in apart]
    fitting = [words for verdict, words in found if verdict == FITS]
    return fitting + [f"{words} (tight)" for verdict, words in found if verdict == TIGHT][: 3 if fitting else 6]


def _possible(planned: PhasePlan) -> Iterator[_Change]:
    """Yield possible changes of a phase, the least intrusive first."""
    phase, model, on_gpu = planned.phase, planned.phase.model, planned.site.on_gpu
    own = "" if planned.alone else f"phases.{planned.name}."  # before settings that a job may have at its top
    if model.gradient_checkpointing is False:
        yield (
            f"{own}model.gradient_checkpointing=true",
            {"model": model.model_copy(update={"gradient_checkpointing": True})},
        )
    yield from _smaller(planned, "micro_batch", phase.micro_batch)
    longest = phase.data.max_length + phase.new_tokens
    if phase.micro_batch is None and planned.groups[0].where.micro_tokens > longest:
        yield f"phases.{planned.name}.micro_tokens={longest}", {"micro_tokens": longest}
    for setting, count in phase.memory_counts.items():
        yield from _smaller(planned, setting, count)
    if not phase.has_sized_groups:
        for stage in range(phase.sharding.stage + 1, 3 if model.compile else 4):
            yield f"{own}sharding.stage={stage}", {"sharding": phase.sharding.model_copy(update={"stage": stage})}
        yield from _more_workers(planned, own)
    if phase.sharding.offload == "none" and on_gpu:
        stage = phase.sharding.stage or 2
        yield (
            f"'{own}sharding={{stage: {stage}, offload: cpu}}'",
            {"sharding": Sharding(stage=stage, offload="cpu")},
        )
    if model.lora is None:
        yield f"'{own}model.lora={{rank: 16}}'", {"model": model.model_copy(update={"lora": Lora()})}
        if on_gpu and not model.compile:
            stage = min(2, phase.sharding.stage)
            staged = "" if stage == phase.sharding.stage else f" {own}sharding.stage={stage}"
            yield (
                f"'{own}model.lora={{rank: 16, bits: 4}}'{staged}",
                {
                    "model": model.model_copy(update={"lora": Lora(bits=4)}),
                    "sharding": phase.sharding.model_copy(update={"stage": stage}),
                },
            )


def _smaller(planned: PhasePlan, name: str, count: int | None) -> Iterator[_Change]:
    """Yield a count that is halved until it fits."""
    while count is not None and count > 1:
        count //= 2
        if planned.changed(**{name: count}).verdict == FITS or count == 1:
            yield f"phases.{planned.name}.{name}={count}", {name: count}
            return


def _more_workers(planned: PhasePlan, own: str) -> Iterator[_Change]:
    """Yield the smallest number of workers that fits, in whole machines, if there are enough."""
    phase, site = planned.phase, planned.site
    resources, step = phase.resources, planned.machine.gpus if site.on_gpu else 1
    most = min(_MOST_WORKERS, phase.batch, site.most_gpus or _MOST_WORKERS)
    for count in range((resources.workers // step + 1) * step, most + 1, step):
        settings = {"resources": resources.model_copy(update={"workers": count})}
        verdict = planned.changed(**settings).verdict
        if verdict == FITS or (count == most and verdict == TIGHT):
            yield f"{own}resources.workers={count}", settings
            return


def stages(planned: PhasePlan) -> list[dict[str, Any]]:
    """Return all ZeRO stages with and without offload."""
    lora = planned.phase.model.lora
    rows = []
    numbers: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    for stage in numbers:
        for offload in ("none", "cpu") if stage and planned.site.on_gpu else ("none",):
            if stage == 3 and lora is not None and lora.bits:
                continue
            sharding = Sharding(stage=stage, offload=offload)
            other = planned.changed(**planned.phase.resharded(sharding))
            device, host = (
                max(sum(getattr(needs, kind).values()) for needs in other.needs) for kind in ("device", "host")
            )
            rows.append(
                {
                    "stage": stage, "offload": offload, "device_gib": gib(device), "host_gib": gib(host),
                    "verdict": other.verdict,
                }
            )  # fmt: skip
    return rows


def layouts(planned: PhasePlan) -> list[dict[str, Any]]:
    """Return other placements of the roles on the same GPUs, the fastest that fits first; none for one role."""
    phase, ways = planned.phase, RECIPES[planned.phase.recipe].layouts
    found = []
    for words, groups in resolve(ways)(phase) if ways else ():
        for stage in sorted({2, 3, phase.sharding.stage}):
            other = planned.changed(groups=groups, sharding=Sharding(stage=stage, offload=phase.sharding.offload))
            worst = max(sum(needs.device.values()) or sum(needs.host.values()) for needs in other.needs)
            found.append(
                {
                    "layout": words, "stage": stage, "iteration_s": other.step_s, "gib": gib(worst),
                    "verdict": other.verdict,
                }
            )  # fmt: skip
    return sorted(found, key=lambda each: (BY_DEGREE.index(each["verdict"]), each["iteration_s"]))
