"""Computes advantages and returns from the outputs of the roles, for policy and critic to learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from training.config import KL, PPO
from training.rl.advantages import adapted_beta, gae, moments, penalised_rewards, whitened
from training.rl.experience import Experience
from training.rl.losses import importance, k1, k3


@dataclass
class State:
    """What one iteration leaves to the next beside weights and moments."""

    beta: float
    scores: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Count, sum and sum of squares of all scores so far."""
    reached: str = ""
    """Why the phase is at its end before its last iteration, if it is."""
    ahead: str = ""
    """Responses to the prompts of the next iteration, if they have been written ahead (`Experience.dumped`)."""

    def follow(self, settings: KL, kl: float, responses: int) -> None:
        """Steer beta after an iteration with this mean KL of a response."""
        if settings.target is not None:
            self.beta = adapted_beta(self.beta, kl, responses, target=settings.target, horizon=settings.horizon)


def estimate(experience: Experience, phase: PPO, state: State) -> dict[str, float]:
    """Adds the facts `advantages`, whitened over all tokens, and `returns` to the experience.

    Of the facts `old`, `reference`, `values` and `score`. Returns what is measured on the way.
    """
    scores_B = torch.from_numpy(np.concatenate(experience.fields["score"]))
    mask_BT = experience.mask
    old_BT, reference_BT, values_BT = (experience.padded(name) for name in ("old", "reference", "values"))
    kl_BT = k1(old_BT, reference_BT)
    beta = state.beta if phase.kl.estimator == "k1" else 0.0
    rewards_BT = penalised_rewards(_final(scores_B, experience, phase, state), kl_BT, mask_BT, beta)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, phase.gamma, phase.lam)
    experience.unpad("advantages", whitened(advantages_BT, mask_BT, moments(advantages_BT, mask_BT)))
    experience.unpad("returns", returns_BT)
    returns, values = returns_BT[mask_BT], values_BT[mask_BT]
    lengths = mask_BT.sum(1).float()
    return {
        "reward": float(scores_B.mean()),
        "reward_std": float(scores_B.std(correction=0)),
        "kl": float((kl_BT * mask_BT).sum(1).mean()),
        "beta": state.beta,
        "explained_variance": float(
            1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        ),
        "response_tokens": float(lengths.mean()),
        "eos_rate": sum(response.ended for response in experience.responses) / len(experience),
        "tokens": int(lengths.sum()),
        "samples": len(experience),
    }


def weigh(experience: Experience) -> dict[str, float]:
    """Adds the fact `importance`, of the facts `old` and `written`. Returns what is measured on the way."""
    old_BT, written_BT = experience.padded("old"), experience.padded("written")
    mask_BT = experience.mask
    experience.unpad("importance", importance(old_BT, written_BT))
    return {"staleness_kl": float(k3(old_BT, written_BT)[mask_BT].mean())}


def _final(scores_B: torch.Tensor, experience: Experience, phase: PPO, state: State) -> torch.Tensor:
    """Scores as they are learnt from: the scale, the limits, the penalty of cut responses."""
    if phase.normalize_scores:
        of_now = [float(len(scores_B)), float(scores_B.sum()), float((scores_B**2).sum())]
        state.scores = [a + b for a, b in zip(state.scores, of_now, strict=True)]
        count, total, squares = state.scores
        scores_B = scores_B / math.sqrt(max(squares / count - (total / count) ** 2, 1e-8))
    if phase.score_clip is not None:
        scores_B = scores_B.clamp(-phase.score_clip, phase.score_clip)
    if phase.missing_eos_penalty is not None:
        ended_B = torch.tensor([response.ended for response in experience.responses])
        scores_B = torch.where(ended_B, scores_B, phase.missing_eos_penalty)
    return scores_B
