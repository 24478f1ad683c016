"""A job file goes to a cluster: checked here, packed with what it needs, submitted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.spec import Cluster
from launcher import clusters
from launcher import job as jobs
from launcher import submit as jobs_there
from launcher.job import Job
from training.errors import InputError
from training.storage import is_remote


def submit(file: Path, overrides: Sequence[str], on: str) -> dict[str, Any]:
    """Id, run and cluster of the job. Raises InputError for all that is wrong with job or cluster, before anything is sent."""
    found = clusters.target(on)
    job = jobs.load(file, overrides, elsewhere=found.spec.shared)
    storage = _storage(job, found.spec)
    name = jobs_there.submit(
        job,
        found.jobs,
        storage=storage,
        shared=found.spec.shared,
        environment={variable: os.environ[variable] for variable in job.env},
    )
    return {"id": name, "run": f"{storage}/{job.name}", "on": on}


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


def submitted_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{facts['id']} is submitted; its run is {facts['run']}"
    yield f"`muster logs -f {facts['id']} --on {facts['on']}` follows it"


def job_lines(jobs_found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not jobs_found:
        yield "no jobs"
    for facts in jobs_found:
        ended = f", ended {facts['ended']}" if facts["ended"] else ""
        yield f"{facts['id']:<32} {facts['state']:<10} {facts['run']}, submitted {facts['submitted']}{ended}"
        if facts["state"] in ("failed", "pending") and facts["message"]:
            yield f"  {facts['message'].strip().splitlines()[0]}"
