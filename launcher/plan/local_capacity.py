"""Checks whether this machine has the capacity for a job's workers, before anything starts.
Jobs on an existing cluster are not checked here."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import psutil

from launcher.jobfile.job import Job
from launcher.jobfile.shared_settings import advised_path
from launcher.process import ray_address
from training.config import Phase
from training.device import DeviceType, device_type, is_accelerator, num_gpus
from training.engine import compiling
from training.errors import InputError, Problem
from training.estimate.memory import PROCESS_BYTES
from training.model_folder import inspect
from training.models import kernels

_FP32, _BF16 = 4, 2


def check(job: Job, *, inline: bool, force: bool = False) -> None:
    """Raises InputError for phases that request more workers than this machine has capacity for,
    or if RAY_ADDRESS is not a cluster.

    `force`: do not check memory.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and not inline:
        ray_address.check(address)
        return
    problems = []
    for name, phase in job.phases.items():
        wrong = (inline and _one_inline(job, name)) or _too_few_gpus(phase) or (not force and _too_little_memory(phase))
        if wrong:
            problems.append(Problem(str(job.file), f"phases.{name}.resources.workers", wrong))
        if wrong := _cannot_quantize(phase):
            problems.append(Problem(str(job.file), f"phases.{name}.model.lora.bits", wrong))
        if wrong := _cannot_fuse(phase):
            problems.append(Problem(str(job.file), f"phases.{name}.model.kernels", wrong))
        if wrong := _cannot_compile(phase):
            problems.append(Problem(str(job.file), f"phases.{name}.model.compile", wrong))
    if problems:
        raise InputError(problems)


def _one_inline(job: Job, name: str) -> str | None:
    phase = job.phases[name]
    if len(phase.placements) > 1:
        return f"--inline has one worker, which runs all roles; remove `groups` (phases.{name}.groups=null)"
    if phase.num_workers == 1:
        return None
    setting = advised_path(job.document, job.own_settings, name, "resources.workers")
    return f"--inline has one worker, but the job requests {phase.num_workers}; set {setting}=1"


def _too_few_gpus(phase: Phase) -> str | None:
    gpus, resources = num_gpus(), phase.resources
    if not gpus and resources.gpus_per_worker == 1:
        return "gpus_per_worker is 1, but this machine has no GPU; set it to auto to train on CPUs"
    if gpus and resources.gpus_per_worker != 0 and phase.num_workers > gpus:
        return f"{phase.num_workers} workers need a GPU each, but this machine has {gpus}"
    return None


def _cannot_quantize(phase: Phase) -> str | None:
    lora = phase.model.lora
    if lora is None or lora.bits is None:
        return None
    if phase.resources.gpus_per_worker == 0 or not num_gpus():
        return (
            "4-bit weights need a GPU, and there is none for the workers; remove `bits` to train adapters on "
            "full-precision weights"
        )
    if find_spec("bitsandbytes") is None:
        return "4-bit weights need the package bitsandbytes; install it with pip install bitsandbytes"
    return None


def device_of(phase: Phase) -> DeviceType:
    """The type of the device of a phase's workers on this machine."""
    return device_type(phase.resources.gpus_per_worker != 0 and num_gpus() > 0)


def _cannot_fuse(phase: Phase) -> str:
    return kernels.lacks(device_of(phase)) if phase.model.kernels == "liger" else ""


def _cannot_compile(phase: Phase) -> str | None:
    missing = compiling.lacks(device_of(phase)) if phase.model.compile else ""
    return f"this machine {missing}; {compiling.ADVICE}" if missing else None


def _too_little_memory(phase: Phase) -> str | None:
    on_gpus = is_accelerator(device_of(phase))
    needs = host_bytes(phase, _num_parameters(phase.model.path), on_gpus=on_gpus)
    available = psutil.virtual_memory().available
    if sum(needs.values()) <= available:
        return None
    parts = ", ".join(f"{what} {_gib(need)}" for what, need in needs.items())
    return (
        f"needs at least {_gib(sum(needs.values()))} GiB of memory ({parts}), but this machine has {_gib(available)} "
        "GiB free; use fewer workers, a smaller model or a higher sharding.stage, set RAY_ADDRESS to train on more "
        "machines, or try it with --force"
    )


def host_bytes(phase: Phase, num_parameters: int, *, on_gpus: bool) -> dict[str, int]:
    """Return the least host memory that a phase with all its workers on this machine needs, by purpose.

    Gradients, activations, buffers and adapters, which are small compared with frozen weights, are not included.
    """
    workers, stage = phase.resources.workers, phase.sharding.stage
    optimizer_here = not on_gpus or phase.sharding.offload == "cpu"
    weights_here = not on_gpus or (optimizer_here and stage == 3)
    full_precision = phase.model.dtype == "fp32"
    trained = num_parameters if phase.model.lora is None else 0
    needs = {"workers": workers * PROCESS_BYTES}
    if trained:
        needs["copy for saving"] = 3 * _FP32 * trained
    if weights_here:
        needs["weights"] = (_FP32 if full_precision else _BF16) * num_parameters * (1 if stage == 3 else workers)
    if optimizer_here and trained:
        # Two moments, and master weights beside weights of another type.
        needs["optimizer"] = (2 if full_precision else 3) * _FP32 * trained * (workers if stage == 0 else 1)
    return needs


def _num_parameters(model: str) -> int:
    """Return the number of parameters, 0 for a model that is not on this machine."""
    folder = Path(model)
    if not folder.is_dir():
        return 0
    return inspect(folder, tokenizer_elsewhere=True, check_code=False).num_parameters


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f}"
