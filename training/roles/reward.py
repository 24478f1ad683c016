"""reward: a scalar head on the language model, trained on pairs of which one answer is preferred.

The score of a sequence is what the head makes of its last token. Both sequences of a pair lie in one row, so they are
always in the same micro-batch: as a tree (training/data/shared_prefix_pairs.py) where the model can be told so, else
one after the other, kept apart by position ids that start again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.data.collate import collate
from training.data.render import sides_of
from training.data.shared_prefix_pairs import Pair, mask_of, trees
from training.data.token_store import TokenStore
from training.estimate.model_traits import rows_of
from training.models import loading as models
from training.models.scoring import marked_last, scores
from training.roles.trainer import Trainer


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
    sides = [[marked_last(side) for pair in row for side in pair] for row in rows]
    batch = collate(sides if packs else [[side] for row in sides for side in row])
    index = batch["target_index"]
    assert index is not None, "each sequence has a last token"
    last_index = index + 1  # of a target, the place before it
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "last_index": last_index}
