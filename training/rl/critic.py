"""The role `critic`: a scalar head on a language model, which estimates what the rest of a response is worth."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from training.config import PPO, Model
from training.data.render import load_tokenizer, same_tokens, tokenizer_for
from training.errors import InputError
from training.model_folder import has_tokenizer, tokenizer_of
from training.process.distributed import RankInfo
from training.rl.learning_role import LearningRole, with_model
from training.rl.modules import ValueLoss
from training.rl.shared_base import policy_model


class Critic(LearningRole):
    """A scalar head on a language model, which says what is to be expected of what stands so far."""

    role = "critic"
    prefix = "critic/"
    adapter = "critic"
    measures = ValueLoss.measures

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        assert phase.critic is not None, "the driver says what the critic starts from"
        _refuse_other_tokens(phase, phase.critic)
        super().__init__(rank_info, with_model(phase, phase.critic), cache)
        self.whole_phase = phase

    def setup(self) -> None:
        """Load the model, start the engine."""
        self.start(self._build)

    def _build(self, dtype: torch.dtype) -> nn.Module:
        lm, ready = policy_model(self.phase, dtype, self.rank_info, self.adapter, classifier=True)
        return ValueLoss(lm, self.phase, ready)


def _refuse_other_tokens(phase: PPO, critic: str) -> None:
    own = tokenizer_of(Model(path=critic))
    if Path(own).is_dir() and not has_tokenizer(Path(own)):
        return  # nothing is known of it
    trust = phase.model.trust_remote_code
    if not same_tokens(load_tokenizer(own, trust), tokenizer_for(phase.model)):
        message = (
            "the critic would read the policy's tokens as others: its tokenizer is another one; start it from a model "
            "that shares the policy's"
        )
        raise InputError.of(critic, message, "critic")
