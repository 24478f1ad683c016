"""Whether this machine has room for a job's workers, before anything is started. A cluster that we join decides for itself."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from launcher.job import Job
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
    """Raises InputError for phases that ask for more workers than this machine can hold."""
    if inline:
        _raise(
            job,
            lambda workers: (
                f"--inline has one worker, the job asks for {workers}; say resources.workers=1" if workers > 1 else None
            ),
        )
        return
    if "RAY_ADDRESS" in os.environ:
        return
    _raise(job, _too_many)


def _raise(job: Job, wrong_with) -> None:
    problems = []
    for name, phase in job.phases.items():
        if wrong := wrong_with(phase.resources.workers):
            problems.append(Problem(str(job.file), f"phases.{name}.resources.workers", wrong))
    if problems:
        raise InputError(problems)


def _too_many(workers: int) -> str | None:
    gpus = num_gpus()
    if gpus:
        return f"{workers} workers need a GPU each, this machine has {gpus}" if workers > gpus else None
    available = psutil.virtual_memory().available
    most = available // _WORKER_BYTES
    if workers <= most:
        return None
    need, there = workers * _WORKER_BYTES / 2**30, available / 2**30
    return f"{workers} workers need {need:,.0f} GiB before they load a model, this machine has {there:,.0f} GiB free; at most {most} fit"
