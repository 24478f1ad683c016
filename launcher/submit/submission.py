"""A job file goes to a cluster: checked here, packed with what it needs, submitted.

What was submitted is noted in ~/.muster/jobs/ID.json (the file and the settings laid over it, no secret),
so that `resume` finds it.
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
    """Id, run and cluster of the job. `words`: for launcher/cli/cluster_entrypoint.py; `force`: also what cannot fit.

    Raises InputError for all that is wrong with job or cluster, before anything is sent.
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
    """Submit a job once more, with further settings. Raises Refused while it runs,
    InputError if it is not known here."""
    refuse_another_folder(overrides)
    info = jobs_there.status(clusters.target(on).jobs, name)
    if not jobs_there.is_over(info):
        raise Refused(f"{name} is {info['state']}; `muster stop {name} --on {on}` saves and ends it")
    try:
        note = json.loads(_note(name).read_text())
    except OSError:
        raise InputError.of(
            name, "was not submitted from this machine; submit its job file again, which goes on where it stopped"
        ) from None
    return submit(Path(note["file"]), [*note["overrides"], *overrides], on, words, force=force)


def _note(name: str) -> Path:
    return muster_home() / "jobs" / f"{name}.json"


def _write_note(name: str, note: Mapping[str, Any]) -> None:
    _note(name).parent.mkdir(parents=True, exist_ok=True)
    _note(name).write_text(json.dumps(note))


def _check_room(phase: Phase, spec: Cluster) -> None:
    """Raises InputError if the phase asks for more workers than the cluster can ever have."""
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
            has = f"{places:.0f} such places at most" if places else "none"
            told = f"{workers} workers with a {each} each; {spec.name} has {has} ({', '.join(map(str, spec.offers))})"
            raise InputError([Problem("", what, told)])


def _with_gpus(phase: Phase, spec: Cluster) -> Phase:
    """The phase with or without a GPU for each worker, as the cluster file has it: none may be up
    yet when the job looks."""
    known = [offer.gpus for offer in spec.offers if offer.gpus is not None]
    undecided = len(known) < len(spec.offers) and not any(known)
    if phase.resources.gpus_per_worker != "auto" or not spec.offers or undecided:
        return phase
    resources = phase.resources.model_copy(update={"gpus_per_worker": int(any(known))})
    return phase.model_copy(update={"resources": resources})


def _storage(job: Job, spec: Cluster) -> str:
    """Where the run is kept: not in a folder of this machine, unless the cluster is this machine."""
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
        f"{job.storage} is a folder of this machine, which the cluster does not see; name a bucket (s3://...) here, or "
        "`storage` in the cluster file",
        "storage",
    )


def submitted_lines(info: Mapping[str, Any]) -> Iterator[str]:
    yield f"{info['id']} is submitted; its run is {info['run']}"
    yield f"`muster logs -f {info['id']} --on {info['on']}` follows it"


def job_lines(jobs_found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not jobs_found:
        yield "no jobs"
    for info in jobs_found:
        ended = f", ended {info['ended']}" if info["ended"] else ""
        yield f"{info['id']:<32} {info['state']:<10} {info['run']}, submitted {info['submitted']}{ended}"
        if info["state"] in ("failed", "pending") and info["message"]:
            yield f"  {info['message'].strip().splitlines()[0]}"
