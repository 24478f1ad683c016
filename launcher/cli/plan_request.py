"""The verb `plan`, from the command line to launcher/plan/plan.py: which job, which machines,
what is known beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import catalog
from cluster import registry as homes
from cluster.spec import Cluster
from launcher.driver import checkpoint_quota
from launcher.jobfile import job as jobs
from launcher.jobfile.job import Job
from launcher.plan import hardware
from launcher.plan import plan as plans
from launcher.plan.hardware import HardwareProfile
from launcher.plan.phase_plan import PlanInputs
from launcher.submit import clusters
from training.errors import InputError

_MOST_GPUS = 100_000
_MOST = 1e15


def asked(
    gpus: str | None, rows: int | None, tokens: float | None, response: float | None, parameters: float | None
) -> PlanInputs:
    """Raises InputError for numbers that are none."""
    for name, value in (("--tokens", tokens), ("--response-tokens", response), ("--parameters", parameters)):
        _refuse_odd(name, value)
    counts = tuple(_count(text) for text in gpus.split(",")) if gpus is not None else ()
    return PlanInputs(rows, tokens, response, None if parameters is None else int(parameters), counts)


def _refuse_odd(name: str, value: float | None) -> None:
    if value is not None and not value < _MOST:  # nor is nan
        raise InputError.of(name, f"{value} is out of all proportion")


def _count(text: str) -> int:
    if not text.strip().isdigit() or not 0 < int(text) <= _MOST_GPUS:
        raise InputError.of("--gpus", f"{text.strip() or 'nothing'} is no number of GPUs; write them as 8,16,64")
    return int(text)


def plan(
    file: Path,
    overrides: Sequence[str],
    what: PlanInputs,
    *,
    on: str | None,
    gpu: str | None,
    per_machine: int | None,
    price: float | None,
) -> dict[str, Any]:
    """The plan of a job file, whose data and weights need not be here."""
    _refuse_odd("--price", price)
    if per_machine is not None and gpu is None:
        raise InputError.of("--per-machine", "goes with --gpu")
    job = jobs.read(file, overrides)
    report = plans.plan(job, _site(job, on, gpu, per_machine, price), what)
    try:
        checkpoint_quota.check(job)
    except InputError as error:
        report["limits"].append(str(error))
    return report


def _site(job: Job, on: str | None, gpu: str | None, per_machine: int | None, price: float | None) -> HardwareProfile:
    wanted = job.accelerator
    if gpu is not None and wanted is not None and catalog.gpu(gpu) != catalog.gpu(wanted):
        raise InputError.of("--gpu", f"the job asks for {wanted} (resources.accelerator); say the same")
    if on is not None:
        spec = spec_of(on)
        if gpu is not None and getattr(spec, "pools", None):
            raise InputError.of("--gpu", f"{spec.name} says itself which GPUs it has; leave --gpu out")
        found = hardware.of_cluster(spec, wanted) if gpu is None else hardware.described(spec, gpu, per_machine)
    elif gpu is not None or wanted is not None:
        found = hardware.of_gpu(str(wanted) if gpu is None else gpu, per_machine)
    else:
        found = hardware.here()
    if price is None:
        return found
    return replace(found, machine=replace(found.machine, price=price, spot_price=None, dated=""), note="")


def spec_of(on: str) -> Cluster:
    """The cluster of a file, up or not, or of a name that is up."""
    if on.endswith((".yaml", ".yml")) or Path(on).is_file():
        return clusters.load(Path(on))
    if homes.find(on) is not None:
        return clusters.target(on).spec
    if "://" in on:
        raise InputError.of("--on", "an address does not say what machines there are; say it with --gpu", on)
    return clusters.target(on).spec  # which says that there is none
