"""Whether this machine has room for a job's workers, before anything is started. A cluster that we join decides for itself."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

from launcher.job import Job
from training.config import Resources
from training.errors import InputError, Problem

_WORKER_BYTES = 450 << 20
"""Memory of a worker that has loaded torch, DeepSpeed and transformers and nothing else (measured: 0.41 GiB)."""


def num_gpus() -> int:
    """GPUs that this process may use, without loading a CUDA library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def check(job: Job, *, inline: bool) -> None:
    """Raises InputError for phases that ask for more workers than this machine can hold, or a cluster that is not there."""
    address = os.environ.get("RAY_ADDRESS")
    if address and not inline:
        _reach(address)
        return
    problems = []
    for name, phase in job.phases.items():
        if wrong := _more_than_one(phase.resources) if inline else _too_many(phase.resources):
            problems.append(Problem(str(job.file), f"phases.{name}.resources.workers", wrong))
    if problems:
        raise InputError(problems)


def _reach(address: str) -> None:
    """Raises InputError if nobody answers at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].partition(":")
    if not port.isdigit():
        return  # a form that Ray understands by itself, such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        message = f"no Ray cluster answers there ({error}); start one, correct RAY_ADDRESS, or unset it to run on this machine"
        raise InputError.of(f"RAY_ADDRESS={address}", message) from error


def _more_than_one(resources: Resources) -> str | None:
    workers = resources.workers
    return f"--inline has one worker, the job asks for {workers}; say resources.workers=1" if workers > 1 else None


def _too_many(resources: Resources) -> str | None:
    workers, gpus = resources.workers, num_gpus() if resources.gpus_per_worker != 0 else 0
    if gpus:
        return f"{workers} workers need a GPU each, this machine has {gpus}" if workers > gpus else None
    if resources.gpus_per_worker == 1:
        return "gpus_per_worker is 1, this machine has no GPU; leave it at auto to train on CPUs"
    available = psutil.virtual_memory().available
    most = available // _WORKER_BYTES
    if workers <= most:
        return None
    need, there = workers * _WORKER_BYTES / 2**30, available / 2**30
    return f"{workers} workers need {need:,.0f} GiB before they load a model, this machine has {there:,.0f} GiB free; at most {most} fit"
