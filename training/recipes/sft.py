"""sft: supervised fine-tuning. Rows are inputs with outputs; the loss is on the outputs' tokens only."""

from __future__ import annotations

from torch import nn

from training.model import TokenLoss
from training.trainer import Trainer


class SFTTrainer(Trainer):
    """Learns the target tokens that the data layer marked: completions, or the assistant's turns."""

    def loss_module(self, lm: nn.Module) -> nn.Module:
        return TokenLoss(lm)
