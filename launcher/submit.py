"""Jobs on a cluster, through Ray Jobs: hand one over, look at them, follow one, stop one.

What Ray keeps of a job everyone on the cluster can read: its metadata hold no secret, and its environment holds them sealed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from launcher import bundle, sealed
from launcher.explain import did_you_mean
from launcher.job import Job

for _module in (dashboard_sdk, sdk):
    _module.logger.setLevel(logging.ERROR)  # uploads and closed connections are ours to tell

Door = Callable[[], AbstractContextManager[Dashboard]]
"""Opens a way to the cluster's dashboard; again, if the last one has broken."""
ENTRYPOINT = "exec python -u -m launcher.onsite"
_RUN, _JOB = "muster_run", "muster_job"
"""Metadata by which our jobs are known."""
_OVER = ("succeeded", "failed", "stopped")
_LOOK_S = 0.5
_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before the connection is tried again; the last one counts from then on."""


@contextmanager
def _through(door: Door) -> Iterator[tuple[JobSubmissionClient, Dashboard]]:
    """Raises Refused for a wrong token, ClusterError for a cluster that does not answer or understand."""
    with door() as dashboard:
        dashboard.version()  # tells a wrong token in plain words
        try:
            yield JobSubmissionClient(dashboard.url, headers=dict(dashboard.headers)), dashboard
        except AuthenticationError as error:
            raise Refused(f"{dashboard.shown}: {error}") from None
        except (requests.RequestException, aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            raise ClusterError(f"{dashboard.shown}: {error}") from None


def submit(
    job: Job, door: Door, *, storage: str, shared: Sequence[str], stop_s: int, environment: Mapping[str, str]
) -> str:
    """Hand a job over; returns its id on the cluster. Raises InputError for what cannot go along, Refused, ClusterError."""
    name = f"{job.name}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory() as folder, _through(door) as (client, dashboard):
        _check_version(dashboard)
        packed = Path(folder) / "bundle.zip"
        bundle.write(job, storage, shared, packed)
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s), **_sealed(environment, dashboard)}
        client.submit_job(
            entrypoint=ENTRYPOINT,
            submission_id=name,
            runtime_env={"working_dir": str(packed), "env_vars": variables},
            metadata={_JOB: job.name, _RUN: f"{storage}/{job.name}"},
        )
    return name


def _check_version(dashboard: Dashboard) -> None:
    """Jobs and workers speak to the cluster with the Ray that is there; they were tested with ours."""
    there = dashboard.version()
    if there != ray.__version__:
        ours = ray.__version__
        raise Refused(f"{dashboard.shown} runs Ray {there}, here is {ours}; install ray=={there} here, or {ours} there")


def _sealed(environment: Mapping[str, str], dashboard: Dashboard) -> dict[str, str]:
    if not environment:
        return {}
    if dashboard.token is None:
        raise Refused(
            f"{dashboard.shown} has no token to seal `env` with: give it one, or set the variables on its machines"
        )
    return {sealed.VARIABLE: sealed.seal(environment, dashboard.token)}


def listing(door: Door) -> list[dict[str, Any]]:
    """The cluster's jobs that came from Muster, the oldest first."""
    with _through(door) as (client, _):
        return _listing(client)


def status(door: Door, name: str) -> dict[str, Any]:
    """Raises Refused for a job that the cluster does not know."""
    with _through(door) as (client, _):
        return _status(client, name)


def _listing(client: JobSubmissionClient) -> list[dict[str, Any]]:
    jobs = [_facts(details) for details in client.list_jobs() if _JOB in (details.metadata or {})]
    return sorted(jobs, key=lambda facts: facts["submitted"] or "")


def _status(client: JobSubmissionClient, name: str) -> dict[str, Any]:
    known = {facts["id"]: facts for facts in _listing(client)}
    if name not in known:
        meant = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
        raise Refused(f"no job {name} on this cluster{meant}")
    return known[name]


def _facts(details: Any) -> dict[str, Any]:
    return {
        "id": details.submission_id,
        "job": details.metadata[_JOB],
        "run": details.metadata[_RUN],
        "state": details.status.value.lower(),
        "message": details.message,
        "submitted": _time(details.start_time),
        "ended": _time(details.end_time),
        "exit_status": details.driver_exit_code,
    }


def _time(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else None


def follow(door: Door, name: str, write: Callable[[str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Pass on what a job prints until it is over, through any number of lost connections; returns how it ended."""
    seen, failures, was_there = 0, 0, False
    while True:
        try:
            with _through(door) as (client, _):
                _status(client, name)
                failures, was_there = 0, True
                for text in _tail(client, name, seen):
                    seen += len(text)
                    write(text)
                facts = _status(client, name)
                if is_over(facts):
                    write(client.get_job_logs(name)[seen:])
                    return facts
                time.sleep(_LOOK_S)  # the stream has ended and the job has not: a new one
        except ClusterError as error:
            if not was_there or isinstance(error, Refused):
                raise
            if failures == 0:
                say(f"the connection is lost ({error}); the job goes on without it; trying again")
            time.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
            failures += 1


def _tail(client: JobSubmissionClient, name: str, seen: int) -> Iterator[str]:
    """What a job prints beyond the first `seen` characters, as it comes, until the connection ends for whatever reason."""
    loop = asyncio.new_event_loop()
    texts: Any = client.tail_job_logs(name)
    try:
        while True:
            try:
                text = loop.run_until_complete(anext(texts))
            except StopAsyncIteration:
                return
            fresh = text[seen:]
            seen = max(0, seen - len(text))
            if fresh:
                yield fresh
    finally:
        loop.run_until_complete(texts.aclose())
        loop.close()


def logs(door: Door, name: str) -> str:
    """All that a job has printed so far."""
    with _through(door) as (client, _):
        _status(client, name)
        return client.get_job_logs(name)


def stop(door: Door, name: str, within_s: float) -> dict[str, Any]:
    """Ask a job to save and end, and wait until it has; returns how it ended. Raises ClusterError if it has not."""
    with _through(door) as (client, _):
        facts = _status(client, name)
        if is_over(facts):
            raise Refused(f"{name} is over: {facts['state']}, since {facts['ended']}")
        client.stop_job(name)
        deadline = time.monotonic() + within_s
        while not is_over(facts := _status(client, name)):
            if time.monotonic() > deadline:
                raise ClusterError(f"{name} was asked to stop and is {facts['state']} after {within_s:.0f} s")
            time.sleep(_LOOK_S)
        return facts


def is_over(facts: Mapping[str, Any]) -> bool:
    return facts["state"] in _OVER
