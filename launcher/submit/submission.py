"""Submits a job file to a cluster: checks it here, packs it with its inputs, and submits it.

Each submission is recorded in ~/.muster/jobs/ID.json (the file and the overrides, no secrets) for `resume`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import Refused
from cluster.registry import muster_home
from cluster.spec import Cluster
from launcher.driver import check, checkpoint_quota
from launcher.jobfile import job as jobs
from launcher.jobfile.job import Job
from launcher.plan import hardware
from launcher.runfolder.run_folder import refuse_another_folder
from launcher.submit import clusters
from launcher.submit import jobs as jobs_there
from training.config import Phase
from training.errors import InputError, Problem
from training.storage import is_remote


def submit(
    file: Path, overrides: Sequence[str], on: str, words: Sequence[str] = (), *, force: bool = False
) -> dict[str, Any]:
    """Submit a job; returns its id, run and cluster. `words`: arguments of launcher/cli/cluster_entrypoint.py; `force`:
    submit it even if it cannot fit.

    Raises InputError with every problem of job or cluster, before anything is sent.
    """
    found = clusters.target(on)
    job = jobs.load(file, overrides, elsewhere=found.spec.shared)
    storage = _storage(job, found.spec)
    job.look_at_phases(lambda phase: _check_room(phase, found.spec))
    if not force:
        checkpoint_quota.check(job)
        check.fits_gpus(job, lambda: hardware.all_of_cluster(found.spec, job.accelerator))
    phases = {name: _with_gpus(phase, found.spec) for name, phase in job.phases.items()}
    name = jobs_there.submit(
        replace(job, phases=phases),
        found.jobs,
        storage=storage,
        shared=found.spec.shared,
        environment={variable: os.environ[variable] for variable in job.env},
        words=words,
    )
    info = {"id": name, "run": f"{storage}/{job.name}", "on": on}
    _write_note(name, {"file": str(file.absolute()), "overrides": list(overrides)})
    return info


def resume(
    name: str, overrides: Sequence[str], on: str, words: Sequence[str], *, force: bool = False
) -> dict[str, Any]:
    """Submit a job again, with further overrides. Raises Refused while it runs,
    InputError if it was not submitted from this machine."""
    refuse_another_folder(overrides)
    info = jobs_there.status(clusters.target(on).jobs, name)
    if not jobs_there.is_over(info):
        raise Refused(f"{name} is {info['state']}; save and stop it first with `muster stop {name} --on {on}`")
    try:
        note = json.loads(_note(name).read_text())
    except OSError:
        raise InputError.of(
            name, "was not submitted from this machine; submit its job file again to resume it where it stopped"
        ) from None
    return submit(Path(note["file"]), [*note["overrides"], *overrides], on, words, force=force)


def _note(name: str) -> Path:
    return muster_home() / "jobs" / f"{name}.json"


def _write_note(name: str, note: Mapping[str, Any]) -> None:
    _note(name).parent.mkdir(parents=True, exist_ok=True)
    _note(name).write_text(json.dumps(note))


def _check_room(phase: Phase, spec: Cluster) -> None:
    """Raises InputError if the phase requests more workers than the cluster can ever have."""
    wanted: dict[tuple[bool, str | None], int] = {}
    for _, team in phase.placements:
        resources = _with_gpus(team, spec).resources
        if resources.gpus_per_worker == "auto":
            return  # the machines will say whether they have any
        kind = (resources.gpus_per_worker == 1, resources.accelerator)
        wanted[kind] = wanted.get(kind, 0) + (resources.min_workers or resources.workers)
    for (on_gpus, gpu), workers in wanted.items():
        places = sum(offer.places(on_gpus=on_gpus, gpu=gpu) for offer in spec.offers)
        if spec.offers and workers > places:
            what = "resources.accelerator" if gpu and not places else "resources.workers"
            each = f"{'GPU' if on_gpus else 'CPU'}{f' of type {gpu}' if gpu else ''}"
            has = f"at most {places:.0f}" if places else "none"
            offers = ", ".join(map(str, spec.offers))
            message = f"{workers} workers need a {each} each; {spec.name} has {has} ({offers})"
            raise InputError([Problem("", what, message)])


def _with_gpus(phase: Phase, spec: Cluster) -> Phase:
    """Return the phase with `gpus_per_worker` decided by the cluster file, since no machine with GPUs may be running
    when the job starts."""
    known = [offer.gpus for offer in spec.offers if offer.gpus is not None]
    undecided = len(known) < len(spec.offers) and not any(known)
    if phase.resources.gpus_per_worker != "auto" or not spec.offers or undecided:
        return phase
    resources = phase.resources.model_copy(update={"gpus_per_worker": int(any(known))})
    return phase.model_copy(update={"resources": resources})


def _storage(job: Job, spec: Cluster) -> str:
    """Return where the run is stored: not in a folder of this machine, unless the cluster is this machine."""
    if (
        is_remote(job.storage)
        or spec.provider == "local"
        or any(Path(job.storage).is_relative_to(s) for s in spec.shared)
    ):
        return job.storage
    if spec.storage is not None:
        return spec.storage.rstrip("/")
    raise InputError.of(
        str(job.file),
        f"{job.storage} is a folder of this machine, which the cluster cannot access; set a bucket (s3://...) here, or "
        "set `storage` in the cluster file",
        "storage",
    )


def submitted_lines(info: Mapping[str, Any]) -> Iterator[str]:
    yield f"{info['id']} is submitted; its run is {info['run']}"
    yield f"follow it with `muster logs -f {info['id']} --on {info['on']}`"


def job_lines(jobs_found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not jobs_found:
        yield "no jobs"
    for info in jobs_found:
        ended = f", ended {info['ended']}" if info["ended"] else ""
        yield f"{info['id']:<32} {info['state']:<10} {info['run']}, submitted {info['submitted']}{ended}"
        if info["state"] in ("failed", "pending") and info["message"]:
            yield f"  {info['message'].strip().splitlines()[0]}"
