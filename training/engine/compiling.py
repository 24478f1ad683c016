"""Compiles the layers of a model with torch, all of them by the same code,
which rows of any length share. Loads torch late."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from training.device import is_accelerator
from training.errors import InputError

if TYPE_CHECKING:
    from torch import nn

ADVICE = "install gcc and Python's headers there (Debian: g++, python3-dev), or leave model.compile out"
_MOST_VARIANTS = 64
"""Of a layer's code: for one row and several, packed and not, learning and evaluated."""


def lacks(device: str) -> str:
    """What this machine lacks to compile for a device (cpu, cuda), in words; nothing if it can."""
    if is_accelerator(device):  # by Triton, in C
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++"]
    if not any(map(shutil.which, compilers)):
        return f"has no compiler ({' or '.join(compilers)})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"has no {header}, which compiled code includes"


def compile_layers(lm: nn.Module, device: str) -> None:
    """Have a model's layers compiled when they are first called, in place: names of parameters stay.

    Raises InputError if this machine cannot compile, or the model has no layers of transformers' kind.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError.of("", f"{type(lm).__name__} has no layers to compile; leave it out", "model.compile")
    if missing := lacks(device):
        raise InputError.of(platform.node(), f"{missing}; {ADVICE}", "model.compile")
    # Set where workers are born, to spare those who compile nothing an import.
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    import torch

    # Of processes that compile; torch would take up to 32 for each worker.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(8, torch.get_num_threads())))
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    for layer in layers:
        layer.compile(dynamic=True)


def eagerly() -> AbstractContextManager[None]:
    """For the length of a block nothing is compiled: writing token by token asks layers
    for other things at every call."""
    import torch

    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
