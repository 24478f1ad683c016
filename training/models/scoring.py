"""The scores of sequences by a language model with a scalar head, which reads the last token of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data.batching import BatchLimits, partition_batch
from training.data.collate import collate, to_device
from training.data.vocabulary import beyond, rows_in
from training.device import ACCELERATOR
from training.errors import InputError
from training.estimate.model_traits import rows_of, traits_of
from training.estimate.transformers_compat import attention_in_use
from training.models import loading as models
from training.models.sparse_last_mlp import last_mlp_at
from training.profiling.breakdown import FORWARD
from training.profiling.profiler import part

_AT_ONCE = {ACCELERATOR: BatchLimits(micro_tokens=0, micro_batch=32), "cpu": BatchLimits(micro_tokens=512)}
"""How much is scored at once. A CPU gains nothing from more, and pays for the padding of unlike lengths."""


def scores(
    lm: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    last_index: Tensor,
    head: nn.Module | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The score of each sequence, read at its last token by a head (None: the model's own), in fp32. [R, L], [N] -> [N]

    `mask` [R, 1, L, L]: what may look where, if position ids do not say it.
    """
    body = getattr(lm, lm.base_model_prefix)
    given = {"position_ids": position_ids, "attention_mask": mask}
    asked = {name: tensor for name, tensor in given.items() if tensor is not None}
    with last_mlp_at(
        body, input_ids, last_index.unique(), known=traits_of(lm).last_mlp
    ):  # two sequences may share a last token
        hidden_RLH = body(input_ids=input_ids, use_cache=False, **asked).last_hidden_state
    scores_N: Tensor = (head or models.head_of(lm))(hidden_RLH.flatten(0, 1)[last_index]).squeeze(-1).float()
    return scores_N


@torch.inference_mode()
def score(lm: Any, sequences: Sequence[np.ndarray], *, head: nn.Module | None = None) -> list[float]:
    """The scores of token sequences, those of like length together.
    One in a row: whatever model a judge is, this it can read.

    Raises InputError for tokens and for positions that the model's embeddings have no row for.
    """
    if wrong := beyond((int(ids.max()) for ids in sequences if len(ids)), rows_in(lm)):
        raise InputError.of("the reward model", wrong)
    device = next(lm.parameters()).device
    out = [0.0] * len(sequences)
    lengths = [len(ids) for ids in sequences]
    positions, longest = _position_rows(lm), max(lengths, default=0)
    if positions is not None and longest > positions:
        message = f"a prompt with its response has {longest:,} tokens, the model has {positions:,} positions"
        raise InputError.of("the reward model", f"{message}; shorten the prompts or the responses")
    above = rows_of(traits_of(lm), attention_in_use(lm), max(lengths, default=0)).same_length_above
    for rows in partition_batch(lengths, 1, replace(_AT_ONCE[device.type], same_length_above=above))[0]:
        places = [place for row in rows for place in row]
        with part(FORWARD):
            micro = to_device(collate([[marked_last(sequences[i].astype(np.int64))] for i in places]), device)
            ids, index = micro["input_ids"], micro["target_index"]
            assert ids is not None, "a batch has rows"
            assert index is not None, "and a last token in each"
            values = scores(lm, ids, None, index + 1, head).tolist()
        for place, value in zip(places, values, strict=True):
            out[place] = value
    return out


def _position_rows(lm: Any) -> int | None:
    """How many positions a model with an embedding of positions has; None for models that compute them."""
    named = (name for name, module in lm.named_modules() if isinstance(module, nn.Embedding))
    has_rows = any("position" in name or name.endswith("wpe") for name in named)
    return getattr(lm.config, "max_position_embeddings", None) if has_rows else None


def marked_last(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of which the last token is marked."""
    return ids, np.arange(len(ids)) == len(ids) - 1
