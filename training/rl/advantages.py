"""From scores to advantages: penalised rewards, generalised advantage estimation, whitening over the global batch.

Shapes: B responses, T places; `mask_BT` is True on the tokens that the policy chose, the end-of-text token included,
and a response's tokens begin at place 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-8


def penalised_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """-beta * KL at every token, and the score at the last one (arXiv:1909.08593, 2203.02155). [B, T]

    A response without tokens gets nothing.
    """
    rewards_BT = torch.where(mask_BT, -beta * kl_BT, 0.0)
    rows = torch.arange(len(scores_B))
    last_B = last_token(mask_BT)
    rewards_BT[rows, last_B] += torch.where(mask_BT.any(1), scores_B, 0.0)
    return rewards_BT


def last_token(mask_BT: Tensor) -> Tensor:
    """Place of the last token of each response; 0 if it has none. [B]"""
    places_T = torch.arange(mask_BT.shape[1])
    return torch.where(mask_BT, places_T, 0).amax(1)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (arXiv:1506.02438). [B, T] each; 0 where there is no token.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t;
    the value after the last token is 0.
    """
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    advantages_BT = torch.zeros_like(rewards_BT)
    advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * advantage_B
        advantages_BT[:, t] = advantage_B
        next_value_B = values_BT[:, t]
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    return advantages_BT, advantages_BT + values_BT


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the tokens, in fp64; those of workers add up. [3]"""
    chosen = x[mask].double()
    return torch.stack([torch.tensor(float(chosen.numel()), dtype=torch.float64), chosen.sum(), (chosen**2).sum()])


def whitened(x: Tensor, mask: Tensor, of_all: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the global batch, whose `moments` are `of_all`;
    0 where there is no token.

    The variance is the biased one, as in OpenRLHF; TRL divides by one less.
    """
    count, total, squares = of_all.tolist()
    mean = total / max(count, 1.0)
    variance = max(squares / max(count, 1.0) - mean**2, _TINY)
    return torch.where(mask, (x - mean) / variance**0.5, 0.0)


def adapted_beta(beta: float, kl: float, samples: int, *, target: float, horizon: int) -> float:
    """The weight of the KL penalty, steered towards a target KL of a response (arXiv:1909.08593, section 2.2).

    After an iteration of so many samples with this mean KL.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * samples / horizon)
