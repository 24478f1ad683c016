"""Computes the MLP of the last layer only at the positions whose output is used.

After its attention no place sees another. What its MLP makes of the other places, such as prompts, nobody reads, and
their gradients are zero: leaving them out changes no number.

Shapes: R rows, L places in a row, H hidden size, N places that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WORTH_IT = 7 / 8
"""Of all places: where more are looked at, picking them costs what it saves."""


@contextmanager
def last_mlp_at(body: Any, input_ids: Tensor, index: Tensor, *, known: bool) -> Iterator[None]:
    """Within the block a decoder computes its last MLP at these places of the flattened rows alone;
    others keep what they had.

    input_ids [R, L]; index [N], no place twice.

    `known`: that its last layer ends with an MLP for each place. Where it does not, or cannot be told to, it computes
    all. The MLP is still called once: ZeRO-3 gathers its weights for a call, and all workers must ask for them equally
    often.
    """
    mlp = _last_mlp(body) if known and len(index) < _WORTH_IT * input_ids.numel() else None
    if mlp is None:
        yield
        return
    plain, own = mlp.forward, vars(mlp).get("forward")

    def forward(hidden_RLH: Tensor) -> Tensor:
        flat = hidden_RLH.flatten(0, 1)
        made_NH = plain(flat[index])
        return flat.new_zeros(flat.shape, dtype=made_NH.dtype).index_copy(0, index, made_NH).view_as(hidden_RLH)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
        if own is not None:
            mlp.forward = own


def _last_mlp(body: Any) -> nn.Module | None:
    """None where it is unknown, compiled with its layer, or called again in the backward pass,
    when the block is long over."""
    layers: Any = getattr(body, "layers", None)
    if not layers:  # a classifier's body may hold the decoder
        return None
    layer = layers[-1]
    again = torch.is_grad_enabled() and body.training and getattr(layer, "gradient_checkpointing", False)
    return None if again or layer._compiled_call_impl is not None else getattr(layer, "mlp", None)
