"""The losses of PPO, a term for each token; whoever calls sums them over the global batch and divides by its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

IMPORTANCE_CAP = 2.0
"""What is rare now and was common then would count without limit: the cap trades a little bias
for it (arXiv:1802.01561)."""


def token_log_probs(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token) of the distribution that was sampled from: logits divided by the temperature. [N], fp32"""
    scaled_NV = logits_NV.float() / temperature
    return scaled_NV.gather(-1, tokens_N[:, None]).squeeze(-1) - scaled_NV.logsumexp(-1)


def entropies(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each distribution, in nats. [N]"""
    log_probs_NV = (logits_NV.float() / temperature).log_softmax(-1)
    return -(log_probs_NV.exp() * log_probs_NV).sum(-1)


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, and negative as often as it wants. Any shape."""
    return log_probs - reference


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1: unbiased, never negative (Schulman, "Approximating KL divergence", 2020). Any shape."""
    difference = log_probs - reference
    return torch.expm1(-difference) + difference


def policy_terms(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A) (arXiv:1707.06347), and whether the clipped one was taken. Any shape."""
    ratio = (log_probs - old).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.min(plain, clipped), clipped < plain


def importance(old: Tensor, written: Tensor) -> Tensor:
    """pi_old / pi_written, IMPORTANCE_CAP at most: the weight of a token that another policy wrote than the one
    that learns from it. Any shape."""
    return (old - written).exp().clamp(max=IMPORTANCE_CAP)


def value_terms(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """0.5 max((V - R)^2, (clip(V) - R)^2), V held within `clip` of what it was. Any shape."""
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max(plain, (held - returns) ** 2)
