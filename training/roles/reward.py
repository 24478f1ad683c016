"""reward: a scalar head on the language model, trained on pairs of which one answer is preferred.

The score of a sequence is what the head makes of its last token. Both sequences of a pair lie in one row, so they are
always in the same micro-batch: as a tree (training/data/shared_prefix_pairs.py) where the model can be told so, else
one after the other, kept apart by position ids that start again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.data.batching import BatchLimits, partition_batch
from training.data.collate import collate, to_device
from training.data.render import sides_of
from training.data.shared_prefix_pairs import Pair, mask_of, trees
from training.data.token_store import TokenStore
from training.data.vocabulary import beyond, rows_in
from training.device import ACCELERATOR
from training.errors import InputError
from training.estimate.model_traits import rows_of
from training.models import loading as models
from training.models.probe import traits_of
from training.models.sparse_last_mlp import last_mlp_at
from training.profiling.breakdown import FORWARD
from training.profiling.profiler import part
from training.roles.trainer import Trainer

_AT_ONCE = {ACCELERATOR: BatchLimits(micro_tokens=0, micro_batch=32), "cpu": BatchLimits(micro_tokens=512)}
"""How much is scored at once. A CPU gains nothing from more, and pays for the padding of unlike lengths."""


class PairLoss(nn.Module):
    """A sequence classifier with one label that returns what is summed over the pairs of a micro-batch."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        last_index: Tensor,
        margins: Tensor,
        branches: Tensor | None = None,
    ) -> Tensor:
        """-log sigmoid(chosen - rejected - margin), and the measures of RewardTrainer, summed over P pairs. [5]

        last_index [2 P]: places, in the flattened rows, of the last tokens: chosen, rejected, chosen, ...  margins [P];
        a margin of -inf marks a pair that does not count. `branches`: as of `trees`, where the rows are such.
        """
        mask = None if branches is None else mask_of(branches)
        rewards_P2 = scores(self.lm, input_ids, position_ids, last_index, mask=mask).view(-1, 2)
        difference_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        counts_P = (margins > -math.inf).float()
        # softplus(-x) is -log sigmoid(x), without overflow.
        loss = functional.softplus(margins - difference_P).sum()
        with torch.no_grad():
            right = ((difference_P > 0) * counts_P).sum()
            both_P2 = rewards_P2 * counts_P[:, None]
            sums = right, (difference_P * counts_P).sum(), both_P2.sum(), (both_P2**2).sum()
        return torch.stack([loss, *sums])


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
    above = rows_of(traits_of(lm), lm.config._attn_implementation, max(lengths, default=0)).same_length_above
    for rows in partition_batch(lengths, 1, replace(_AT_ONCE[device.type], same_length_above=above))[0]:
        places = [place for row in rows for place in row]
        with part(FORWARD):
            micro = to_device(collate([[_judged(sequences[i].astype(np.int64))] for i in places]), device)
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


class RewardTrainer(Trainer):
    """Learns to score the preferred answer of each pair higher."""

    measures = ("loss", "accuracy", "margin", "reward", "reward_square")
    """Sums over the pairs: right orders, differences, both rewards, their squares."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        lm: Any = models.load(self.phase, dtype, self.rank_info.device, classifier=True)
        self.makes_trees = self.traits.kernel(self.attention).trees
        self.packs = rows_of(self.traits, self.attention, self.longest).packs
        return PairLoss(lm)

    def weight_of(self, store: TokenStore, samples: np.ndarray) -> int:
        """The loss is a mean over pairs."""
        return len(samples)

    def collated(self, store: TokenStore, rows: list[list[int]]) -> dict[str, Tensor | None]:
        if not rows:
            batch = collate([])
            return {
                "input_ids": batch["input_ids"],
                "position_ids": None,
                "last_index": torch.zeros(2, dtype=torch.long),
                "margins": torch.full((1,), -math.inf),
            }
        pairs = [[sides_of(*store[sample]) for sample in row] for row in rows]
        margins = np.array([store.margins[sample] for row in rows for sample in row], np.float32)
        return {
            **(trees(pairs) if self.makes_trees else _one_after_the_other(pairs, packs=self.packs)),
            "margins": torch.from_numpy(margins),
        }

    def told(self, means: dict[str, float]) -> dict[str, float]:
        reward = means["reward"] / 2  # two in a pair
        variance = means["reward_square"] / 2 - reward**2
        return {
            "loss": means["loss"],
            "accuracy": means["accuracy"],
            "margin": means["margin"],
            "reward_mean": reward,
            "reward_std": math.sqrt(max(0.0, variance)),
        }


def _one_after_the_other(rows: Sequence[Sequence[Pair]], *, packs: bool = True) -> dict[str, Tensor | None]:
    """As `trees`, with nothing shared. `packs`: whether the model keeps sequences that share a row apart;
    else each has a row of its own."""
    sides = [[_judged(side) for pair in row for side in pair] for row in rows]
    batch = collate(sides if packs else [[side] for row in sides for side in row])
    index = batch["target_index"]
    assert index is not None, "each sequence has a last token"
    last_index = index + 1  # of a target, the place before it
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "last_index": last_index}


def _judged(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of which the last token is marked."""
    return ids, np.arange(len(ids)) == len(ids) - 1
