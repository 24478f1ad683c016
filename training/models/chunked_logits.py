"""Applies the head of a language model to chunks of positions, so that the logits of all positions never exist
together.

At 4,096 places and a vocabulary of 128,000 the logits of a micro-batch and their gradient are 5 GB, more than all else
that a LoRA step keeps. Above LOGITS_AT_ONCE a chunk's logits are computed, measured and forgotten, and computed again
in the backward pass: one more forward pass of the head alone.

Shapes: R rows, L places in a row, N places that are measured, V vocabulary, K measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.estimate.memory import LOGITS_AT_ONCE
from training.estimate.model_traits import traits_of
from training.models.sparse_last_mlp import last_mlp_at

Measure = Callable[..., Tensor]
"""From the logits of n places [n, V], and what else is known of each, K numbers of each. [n, K]"""


def apply_head_chunked(
    lm: Any, input_ids: Tensor, position_ids: Tensor | None, index: Tensor, measure: Measure, *known: Tensor
) -> Tensor:
    """Measures of what a causal language model says of the tokens after N places of the flattened
    rows. [R, L], [N] -> [N, K]

    `known` [N, ...] is handed to `measure` beside the logits.
    """
    known_of_lm = traits_of(lm)
    inputs = {"input_ids": input_ids} | ({} if position_ids is None else {"position_ids": position_ids})
    if not known_of_lm.body:  # they are scaled or capped, or the decoder's are not the states that the head reads
        logits_RLV = lm(**inputs, use_cache=False).logits
        return measure(logits_RLV.flatten(0, 1)[index], *known)
    # Only these places go through the head: prompts cost no logits.
    body = lm.get_decoder()
    with last_mlp_at(body, input_ids, index, known=known_of_lm.last_mlp):
        hidden_RLH = body(**inputs, use_cache=False).last_hidden_state
    hidden_NH = hidden_RLH.flatten(0, 1)[index]
    head = lm.get_output_embeddings()
    num_chunks = -(-len(index) * lm.config.get_text_config().vocab_size // LOGITS_AT_ONCE)
    if num_chunks <= 1:
        return measure(head(hidden_NH), *known)
    with _measuring(head, measure, known, num_chunks):
        logits_NV: Tensor = head(hidden_NH)
        return logits_NV


@contextmanager
def _measuring(head: nn.Module, measure: Measure, known: tuple[Tensor, ...], num_chunks: int) -> Iterator[None]:
    """Within the block the head answers with measures of its logits.

    It is still called once: ZeRO-3 gathers its weights for a call, forward and backward, and all workers must ask for
    them equally often, however many places each has.
    """
    plain = head.forward

    def of_chunk(hidden: Tensor, *known_of_chunk: Tensor) -> Tensor:
        return measure(plain(hidden), *known_of_chunk)

    def forward(hidden_NH: Tensor) -> Tensor:
        chunks = zip(*(each.tensor_split(num_chunks) for each in (hidden_NH, *known)), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([of_chunk(*chunk) for chunk in chunks])
        again = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.cat(again)

    own = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
