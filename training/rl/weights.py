"""Weights on their way from the policy to a rollout group, as arrays that any process can read."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Weights = dict[str, tuple[NDArray[Any], str]]
"""Parameters as arrays that any process can read, and their types."""


def packed(tensor: Tensor) -> tuple[NDArray[Any], str]:
    """A tensor as an array and its type: numpy knows no bfloat16."""
    on_host = tensor.detach().cpu().contiguous()
    raw = on_host.view(torch.int16) if on_host.dtype is torch.bfloat16 else on_host
    return raw.numpy(), str(on_host.dtype).removeprefix("torch.")


def unpacked(values: NDArray[Any], dtype: str) -> Tensor:
    """The tensor again, in the array's own memory where that may be written to."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).view(getattr(torch, dtype))
