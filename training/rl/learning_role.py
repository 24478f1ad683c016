"""What policy and critic have in common: they compute on shares and learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import PPO
from training.data.batching import BatchLimits, limits_for
from training.estimate.model_traits import rows_of
from training.model_folder import tokenizer_of, tokenizer_revision
from training.models import loading as models
from training.process.distributed import RankInfo
from training.profiling.breakdown import DATA
from training.profiling.profiler import part
from training.rl.experience import Share, collated, split
from training.roles.learner import Learner


def limits_of(phase: PPO, rank_info: RankInfo) -> BatchLimits:
    """What a micro-batch of prompts with their responses may hold."""
    attention, longest = (
        models.resolve_attention(phase.model, rank_info.device),
        phase.data.max_length + phase.response_tokens,
    )
    rows = rows_of(models.resolve_traits(phase.model), attention, longest)
    return limits_for(phase, longest, rank_info.device, attention, **asdict(rows))


def with_model(phase: PPO, path: str) -> PPO:
    """The phase with another model of the same tokenizer."""
    tokenizer = tokenizer_of(phase.model)
    changes = {"tokenizer": tokenizer, "tokenizer_revision": tokenizer_revision(phase.model)}
    model = phase.model.model_copy(update={"path": str(Path(path)), **changes})
    return phase.model_copy(update={"model": model})


class LearningRole(Learner):
    """What policy and critic have in common."""

    phase: PPO
    measures: tuple[str, ...]

    def limits(self) -> BatchLimits:
        return limits_of(self.phase, self.rank_info)

    def computed(self, share: Share) -> list[NDArray[np.float32]]:
        """What the module says of the tokens of each response, [T] each, in the order of the share."""
        with part(DATA):
            micros = [collated(rows, ()) for rows in share]
        return split(share, self.engine.compute(micros))

    def improve(
        self,
        shares: Sequence[Share],
        weights: Sequence[int],
        learning_rate: float,
        names: Sequence[str],
        numbers: Mapping[str, float],
    ) -> dict[str, Any]:
        """One update of the weights for each share; `weights` are the response tokens of all workers' shares.

        The module gets the facts of these names, and these numbers.
        Answers with the means of `measures` over each update's tokens, and its gradient norm.
        """
        sums, norms = [], []
        for share, weight in zip(shares, weights, strict=True):
            with part(DATA):
                of_all = {name: torch.tensor(number) for name, number in numbers.items()}
                micros = [{**collated(rows, names), **of_all} for rows in share]
            total, norm = self.engine.step(micros, weight=weight, learning_rate=learning_rate)
            sums.append(total)
            norms.append(float(norm))
        means = self.engine.sum_over_workers(torch.stack(sums)).cpu() / torch.tensor(weights)[:, None]
        return {
            "means": [dict(zip(self.measures, row, strict=True)) for row in means.tolist()],
            "grad_norms": norms,
            "memory_gib": self.memory_gib(),
            "gpu_full": self.gpu_full(),
        }
