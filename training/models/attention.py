"""An attention kernel of ours: torch's own, sample by sample where samples share a row.

Torch's kernel takes a mask for a packed row and pays for all of its places, whoever may look there. Told where samples
begin it is called once for each, causal and without a mask: what a kernel for packed rows does on GPUs.

Shapes: R rows, L places in a row, H heads, D numbers a head, S samples in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.data.batching import SDPA_VARLEN


def register() -> None:
    """Make it known to transformers by its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SDPA_VARLEN, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA_VARLEN, _mask)


def _mask(**asked: Any) -> Tensor | None:
    """What transformers hands to every layer as the mask: [S] lengths of the samples of a row
    where these say it all, else sdpa's."""
    from transformers.masking_utils import sdpa_mask

    lengths = _lengths(**asked)
    return sdpa_mask(**asked) if lengths is None else lengths


def _lengths(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool,
    use_vmap: bool,
    device: torch.device,
    **_: Any,
) -> Tensor | None:
    """Lengths of stretches of a row [S] that look back at all of themselves and at nothing else.
    None: the mask is another one, or none is needed.

    `mask_function` says whether place q looks at place k. Asked along three lines,
    it has told all that a mask is made of.
    """
    plain = allow_is_causal_skip or use_vmap or attention_mask is not None
    if plain or batch_size != 1 or q_length != kv_length or q_length < 2:
        return None
    nought = torch.zeros((), dtype=torch.long, device=device)
    place_L = torch.arange(q_length, device=device)
    before = mask_function(nought, nought, place_L[1:], place_L[:-1])
    after = mask_function(nought, nought, place_L[:-1], place_L[1:])
    begins_L = torch.cat([before.new_ones(1), ~before])
    first_L = torch.where(begins_L, place_L, nought).cummax(0).values
    if bool(after.any()) or not bool(mask_function(nought, nought, place_L, first_L).all()):
        return None  # it looks ahead, or a window is shorter than a sample
    starts_S = place_L[begins_L]
    return torch.diff(starts_S, append=starts_S.new_tensor([q_length]))


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers calls an attention: [R, H, L, D] each -> [R, L, H, D]. `attention_mask` as of `_mask`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sdpa: Any = sdpa_attention_forward
    if attention_mask is None or attention_mask.dim() > 1:
        return sdpa(module, query, key, value, attention_mask, **settings)[0], None
    lengths = attention_mask.tolist()
    samples = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    return torch.cat([sdpa(module, *sample, None, **settings)[0] for sample in samples], dim=1), None
