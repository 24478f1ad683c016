"""The verb `plan`, from the command line to launcher/plan.py: which job, which machines, what is known beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import home as homes
from cluster.spec import Cluster
from launcher import clusters, site
from launcher import job as jobs
from launcher import plan as plans
from launcher.job import Job
from launcher.plan import Asked
from launcher.site import Site
from training.errors import InputError

_MOST_GPUS = 100_000


def asked(
    gpus: str | None, rows: int | None, tokens: float | None, response: float | None, parameters: float | None
) -> Asked:
    """Raises InputError for numbers that are none."""
    counts = tuple(_count(text) for text in gpus.split(",")) if gpus is not None else ()
    return Asked(rows, tokens, response, None if parameters is None else int(parameters), counts)


def _count(text: str) -> int:
    if not text.strip().isdigit() or not 0 < int(text) <= _MOST_GPUS:
        raise InputError.of("--gpus", f"{text.strip() or 'nothing'} is no number of GPUs; write them as 8,16,64")
    return int(text)


def plan(
    file: Path,
    overrides: Sequence[str],
    what: Asked,
    *,
    on: str | None,
    gpu: str | None,
    per_machine: int | None,
    price: float | None,
) -> dict[str, Any]:
    """The plan of a job file, whose data and weights need not be here."""
    if on is not None and (gpu is not None or per_machine is not None):
        raise InputError.of("command line", "--on names the machines; leave --gpu and --per-machine out")
    job = jobs.read(file, overrides)
    return plans.plan(job, _site(job, on, gpu, per_machine, price), what)


def _site(job: Job, on: str | None, gpu: str | None, per_machine: int | None, price: float | None) -> Site:
    kinds = {phase.resources.accelerator for phase in job.phases.values()} - {None}
    wanted = next(iter(kinds)) if len(kinds) == 1 else None
    if on is not None:
        found = site.of_cluster(spec_of(on), wanted)
    elif gpu is not None or wanted is not None:
        found = site.of_gpu(gpu or str(wanted), per_machine)
    else:
        found = site.here()
    return (
        found
        if price is None
        else replace(found, machine=replace(found.machine, price=price, spot_price=None, dated=""))
    )


def spec_of(on: str) -> Cluster:
    """The cluster of a file, up or not, or of a name that is up."""
    if on.endswith((".yaml", ".yml")) or Path(on).is_file():
        return clusters.load(Path(on))
    if homes.find(on) is not None:
        return clusters.target(on).spec
    if "://" in on:
        raise InputError.of("--on", "an address does not say what machines there are; say it with --gpu", on)
    return clusters.target(on).spec  # which says that there is none
