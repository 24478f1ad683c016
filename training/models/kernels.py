"""Liger's fused kernels for norms, rotations and gated layers: where there are a GPU,
the package and a model that they know."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

from training.config import Model
from training.device import is_accelerator
from training.engine import compiling
from training.errors import InputError

Kernels = Literal["torch", "liger"]
_FUSED = {
    "rope": True, "rms_norm": True, "layer_norm": True, "swiglu": True, "geglu": True,
    "cross_entropy": False, "fused_linear_cross_entropy": False,
}  # fmt: skip
"""The loss is not theirs: they average it over a micro-batch, here it is a sum over the targets of a global batch."""


def lacks(device: str) -> str:
    """What is missing to use them on a device (cpu, cuda), in words; nothing if they can be."""
    if not is_accelerator(device):
        return "Liger's kernels need a GPU, and there is none for the workers; leave kernels out"
    if find_spec("liger_kernel") is None:
        return "Liger's kernels need the package liger-kernel; pip install liger-kernel"
    missing = compiling.lacks(device)
    return f"Liger's kernels are compiled when they are first used, and this machine {missing}" if missing else ""


def resolve(model: Model, device: str, model_type: Callable[[], str]) -> Kernels:
    """The kernels of a model. auto: Liger's where they can be used, and layers are not compiled,
    which fuses the same operations.

    `model_type`: as in its config.json. Raises InputError if Liger's are asked for and cannot be had.
    """
    if model.kernels == "torch" or (model.kernels == "auto" and model.compile):
        return "torch"
    missing = lacks(device) or _unknown(model_type())
    if missing and model.kernels == "liger":
        raise InputError.of(model.path, missing, "model.kernels")
    return "torch" if missing else "liger"


def _unknown(model_type: str) -> str:
    known = _known_types()
    return "" if model_type in known else f"Liger has no kernels for models of type {model_type}; leave kernels out"


def _known_types() -> set[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return set(MODEL_TYPE_TO_APPLY_LIGER_FN)


def fuse(lm: Any) -> None:
    """Have a model of transformers compute with them, in place; names of parameters stay.
    Holds for its class in this process."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(lm, _FUSED)
