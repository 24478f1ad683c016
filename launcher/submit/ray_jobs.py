"""Jobs through Ray Jobs, for every Ray cluster.

Everyone on the cluster can read what Ray stores about a job: its metadata have no secrets, and its environment has them
sealed.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from launcher.submit import sealed_env
from launcher.workers import ray_compat

ray_compat.silence_job_client()

Door = Callable[[], AbstractContextManager[Dashboard]]
_ENTRYPOINT = (
    "exec",
    "python",
    "-P",
    "-u",
    "-m",
    "launcher.cli.cluster_entrypoint",
)  # Ray puts the bundle into PYTHONPATH
_SAVE = (*_ENTRYPOINT[:-1], "launcher.cli.cluster_save")
_LOOK_S = 0.5
_RUN, _JOB = "muster_run", "muster_job"
"""Metadata keys that mark Muster's jobs."""


class RaySession:
    """A connection to a cluster. Its methods raise ClusterError if it breaks."""

    def __init__(self, client: JobSubmissionClient, dashboard: Dashboard, stop_s: int):
        self.client, self.dashboard, self.stop_s = client, dashboard, stop_s

    def submit(
        self, name: str, packed: Path, info: Mapping[str, str], workers: int, environment: Mapping[str, str],
        words: Sequence[str]
    ) -> None:  # fmt: skip
        self._check_version()
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_s), **self._sealed(environment)}
        self.client.submit_job(
            entrypoint=shlex.join([*_ENTRYPOINT, *words]),
            submission_id=name,
            runtime_env={"working_dir": str(packed), "env_vars": variables},
            metadata={_JOB: info["job"], _RUN: info["run"]},
        )

    def _check_version(self) -> None:
        """Raises Refused for another version of Ray: Muster's jobs were tested with the local one."""
        there, ours = self.dashboard.version(), ray.__version__
        if there != ours:
            raise Refused(
                f"{self.dashboard.shown} runs Ray {there}, but this machine has {ours}; install ray=={there} here, or "
                f"ray=={ours} there"
            )

    def _sealed(self, environment: Mapping[str, str]) -> dict[str, str]:
        if not environment:
            return {}
        if self.dashboard.token is None:
            raise Refused(
                f"{self.dashboard.shown} has no token to encrypt `env` with; give it a token, or set the variables on "
                "its machines"
            )
        return {sealed_env.VARIABLE: sealed_env.seal(environment, self.dashboard.token)}

    def jobs(self) -> list[dict[str, Any]]:
        jobs = [_info(details) for details in self.client.list_jobs() if _JOB in (details.metadata or {})]
        return sorted(jobs, key=lambda info: info["submitted"] or "")

    def stream(self, name: str, seen: int) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        texts: Any = self.client.tail_job_logs(name)
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

    def rest(self, name: str, seen: int) -> str:
        return self.client.get_job_logs(name)[seen:]

    def save(self, name: str, run: str) -> str:
        """Run a small job with the same code and environment on the machine of the job's driver."""
        environment = self.client.get_job_info(name).runtime_env
        helper = self.client.submit_job(entrypoint=shlex.join([*_SAVE, run]), runtime_env=environment)
        try:
            while not self.client.get_job_status(helper).is_terminal():
                time.sleep(_LOOK_S)
            return self.client.get_job_logs(helper)
        finally:
            self.client.stop_job(helper)

    def stop(self, name: str) -> None:
        self.client.stop_job(name)


@contextmanager
def opened(connection: Door, stop_s: int) -> Iterator[RaySession]:
    """Raises Refused for a wrong token, ClusterError for a cluster that does not answer or answers with an error."""
    with connection() as dashboard:
        dashboard.version()  # tells a wrong token in plain words
        try:
            yield RaySession(JobSubmissionClient(dashboard.url, headers=dict(dashboard.headers)), dashboard, stop_s)
        except AuthenticationError as error:
            raise Refused(f"{dashboard.shown}: {error}") from None
        except (requests.RequestException, aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            raise ClusterError(f"{dashboard.shown}: {error}") from None


def _info(details: Any) -> dict[str, Any]:
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
