"""Jobs on a cluster, through Ray or Slurm: submit, list, follow, save and stop them."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ClusterError, Refused
from launcher.jobfile.job import Job
from launcher.jobfile.validation_messages import did_you_mean
from launcher.submit import bundle

_OVER = ("succeeded", "failed", "stopped")
_LOOK_S = 0.5
_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before each reconnection; the last one repeats."""


class Session(Protocol):
    """A connection to a job service. Raises ClusterError if it breaks, Refused for an invalid request."""

    def submit(
        self,
        name: str,
        packed: Path,
        info: Mapping[str, str],
        workers: int,
        environment: Mapping[str, str],
        words: Sequence[str],
    ) -> None:
        """Submit a bundle. `info`: job, run. `environment`: secrets, which must not be stored in plain text.
        `words`: arguments of launcher/cli/cluster_entrypoint.py."""
        ...

    def jobs(self) -> list[dict[str, Any]]:
        """Return Muster's jobs, the oldest first: id, job, run, state, message, submitted, ended, exit_status."""
        ...

    def stream(self, name: str, seen: int) -> Iterator[str]:
        """Yield the output of a job after the first `seen` characters, until there is no more for now."""
        ...

    def rest(self, name: str, seen: int) -> str:
        """Return the output of a job after the first `seen` characters."""
        ...

    def save(self, name: str, run: str) -> str:
        """Run launcher/cli/cluster_save.py to request a checkpoint of the job's run; returns its output."""
        ...

    def stop(self, name: str) -> None:
        """Request that a job saves and ends."""
        ...


Open = Callable[[], AbstractContextManager[Session]]
"""Opens a connection; called again after the last one broke."""


def submit(
    job: Job,
    connect: Open,
    *,
    storage: str,
    shared: Sequence[str],
    environment: Mapping[str, str],
    words: Sequence[str],
) -> str:
    """Submit a job; returns its id there. Raises InputError for files that it cannot upload, Refused, ClusterError."""
    name = f"{job.name}-{secrets.token_hex(3)}"
    workers = max(phase.num_workers for phase in job.phases.values())
    with tempfile.TemporaryDirectory() as folder, connect() as there:
        packed = Path(folder) / "bundle.zip"
        bundle.write(job, storage, shared, packed)
        there.submit(name, packed, {"job": job.name, "run": f"{storage}/{job.name}"}, workers, environment, words)
    return name


def listing(connect: Open) -> list[dict[str, Any]]:
    """Return the jobs there that Muster submitted, the oldest first."""
    with connect() as there:
        return there.jobs()


def status(connect: Open, name: str) -> dict[str, Any]:
    """Raises Refused for a job that is not known there."""
    with connect() as there:
        return _status(there, name)


def _status(there: Session, name: str) -> dict[str, Any]:
    known = {info["id"]: info for info in there.jobs()}
    if name not in known:
        meant = did_you_mean(name, known) or f"; its jobs are {', '.join(known) or 'none'}"
        raise Refused(f"no job {name} on this cluster{meant}")
    return known[name]


def follow(connect: Open, name: str, write: Callable[[str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Show the output of a job until it ends, through any number of lost connections; returns how it ended."""
    seen, failures, was_there = 0, 0, False
    while True:
        try:
            with connect() as there:
                _status(there, name)
                failures, was_there = 0, True
                for text in there.stream(name, seen):
                    seen += len(text)
                    write(text)
                info = _status(there, name)
                if is_over(info):
                    write(there.rest(name, seen))
                    return info
                time.sleep(_LOOK_S)  # the stream has ended and the job has not: a new one
        except ClusterError as error:
            if not was_there or isinstance(error, Refused):
                raise
            if failures == 0:
                say(f"the connection is lost ({error}); the job keeps running; reconnecting")
            time.sleep(_AGAIN_S[min(failures, len(_AGAIN_S) - 1)])
            failures += 1


def logs(connect: Open, name: str) -> str:
    """Return the output of a job so far."""
    with connect() as there:
        _status(there, name)
        return there.rest(name, 0)


def save(connect: Open, name: str) -> dict[str, Any]:
    """Make a job save now and continue, and wait for it; returns the checkpoint.
    Raises Refused if it cannot, ClusterError."""
    with connect() as there:
        info = _status(there, name)
        if info["state"] != "running":
            raise Refused(f"{name} is not running (it is {info['state']}); there is nothing to save")
        said = there.save(name, info["run"])
    try:
        answer: dict[str, Any] = json.loads(said.strip().rpartition("\n")[2])
    except ValueError:
        raise ClusterError(f"{name}: unexpected answer to the request to save: {said.strip()}") from None
    if "error" in answer:
        raise Refused(answer["error"])
    return answer


def stop(connect: Open, name: str, within_s: float) -> dict[str, Any]:
    """Request that a job saves and ends, and wait for it; returns how it ended. Raises ClusterError on a timeout."""
    with connect() as there:
        info = _status(there, name)
        if is_over(info):
            raise Refused(f"{name} has already ended: {info['state']} at {info['ended']}")
        there.stop(name)
        deadline = time.monotonic() + within_s
        while not is_over(info := _status(there, name)):
            if time.monotonic() > deadline:
                raise ClusterError(f"{name} did not stop within {within_s:.0f} s (it is {info['state']})")
            time.sleep(_LOOK_S)
        return info


def is_over(info: Mapping[str, Any]) -> bool:
    return info["state"] in _OVER
