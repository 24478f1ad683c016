"""Roles that do not learn: the reference, and all rewards of a job."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.config import PPO
from training.data.batching import BatchLimits
from training.engine.engine import Frozen
from training.models import loading as models
from training.process.distributed import RankInfo
from training.profiling.breakdown import DATA
from training.profiling.profiler import part
from training.rl.experience import Response, Share, collated, split
from training.rl.learning_role import limits_of
from training.rl.modules import PolicyLoss
from training.rl.rewards import opened, total
from training.rl.shared_base import reference_model


class Reference:
    """The policy as it was before it was improved."""

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        self.rank_info, self.phase = rank_info, phase

    def setup(self) -> None:
        """Load the model."""
        dtype = models.resolve_dtype(self.phase.model.dtype, self.rank_info.device)
        self.frozen = Frozen(self._build, self.phase, self.rank_info, dtype)

    def _build(self, dtype: torch.dtype) -> nn.Module:
        lm, ready = reference_model(self.phase, dtype, self.rank_info)
        return PolicyLoss(lm, self.phase, ready)

    def limits(self) -> BatchLimits:
        return limits_of(self.phase, self.rank_info)

    def computed(self, share: Share) -> list[NDArray[np.float32]]:
        """The log-probabilities of the tokens of each response."""
        with part(DATA):
            micros = [collated(rows, ()) for rows in share]
        return split(share, self.frozen.compute(micros))


class RewardRole:
    """All rewards of a job. Each worker scores a part of the responses."""

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        self.rank_info, self.phase = rank_info, phase

    def setup(self) -> None:
        """Load reward models, import functions."""
        self.scorers = [(source.weight, opened(source, self.phase, self.rank_info)) for source in self.phase.rewards]

    def scores(self, responses: Sequence[Response]) -> list[NDArray[np.float32]]:
        """The weighted sum of all rewards of each response. [1] each"""
        if not responses:
            return []
        scores = [(weight, scorer(responses)) for weight, scorer in self.scorers]
        return list(total(scores, responses).astype(np.float32)[:, None])
