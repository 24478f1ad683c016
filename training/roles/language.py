"""pretrain, sft, cft: next-token prediction on the tokens that the data layer marked as targets.

What the three teach is a matter of the rows alone: all of a document, the answers, the critiques.
"""

from __future__ import annotations

import torch
from torch import nn

from training.models import loading as models
from training.models.loading import TokenLoss
from training.roles.trainer import Trainer


class LanguageTrainer(Trainer):
    """Learns the target tokens; the loss is their mean over the global batch."""

    measures = ("loss",)

    def build(self, dtype: torch.dtype) -> nn.Module:
        return TokenLoss(models.load(self.phase, dtype, self.rank_info.device))
