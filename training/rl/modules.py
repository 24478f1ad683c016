"""The modules that policy and critic train: log-probabilities or values when asked for them, else sums of losses to learn from.

Shapes: R rows, L places in a row, N response tokens, as in training/rl/experience.py. `counts` is 0 where a worker had nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.config import PPO
from training.model import logits_at
from training.recipes.reward import scores
from training.rl.losses import entropies, k3, policy_terms, token_log_probs, value_terms


class _OfTokens(nn.Module):
    """A model that computes for one role."""

    def __init__(self, lm: nn.Module, phase: PPO, ready: Callable[[], None]):
        super().__init__()
        self.lm = lm
        self.phase = phase
        self.ready = ready
        """Called before the model computes, which it may do for other roles in between."""


class PolicyLoss(_OfTokens):
    """A causal language model as a policy."""

    measures = ("policy_loss", "clip_fraction", "approx_kl", "entropy")

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, target_index: Tensor, target_ids: Tensor, counts: Tensor,
        old: Tensor | None = None, advantages: Tensor | None = None, reference: Tensor | None = None, beta: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Without `old` the log-probabilities of the N tokens at the temperature of the rollout. [N]

        With it the sums of `measures` over them, the loss first. [4]  With `beta` the KL to `reference` is part of the loss.
        """
        self.ready()
        phase = self.phase
        logits_NV = logits_at(self.lm, input_ids, position_ids, target_index)
        log_probs_N = token_log_probs(logits_NV, target_ids.clamp(min=0), phase.temperature)
        if old is None or advantages is None:
            return log_probs_N
        terms_N, clipped_N = policy_terms(log_probs_N, old, advantages, phase.clip_range)
        with torch.set_grad_enabled(phase.entropy > 0 and torch.is_grad_enabled()):
            entropies_N = entropies(logits_NV, phase.temperature)
        if phase.entropy > 0:
            terms_N = terms_N - phase.entropy * entropies_N
        if reference is not None and beta is not None:
            terms_N = terms_N + beta * k3(log_probs_N, reference)
        approx_kl_N = k3(log_probs_N.detach(), old)
        return torch.stack([(each * counts).sum() for each in (terms_N, clipped_N, approx_kl_N, entropies_N)])


class ValueLoss(_OfTokens):
    """A sequence classifier with one label as a critic: its head read at every place that a token follows."""

    measures = ("value_loss",)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, target_index: Tensor, target_ids: Tensor, counts: Tensor,
        values: Tensor | None = None, returns: Tensor | None = None, clip: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Without `returns` the value of what stands before each of the N tokens. [N]  With them the summed loss, clipped or not. [1]"""
        self.ready()
        values_N = scores(self.lm, input_ids, position_ids, target_index)
        if values is None or returns is None:
            return values_N
        held = None if clip is None else float(clip)
        return (value_terms(values_N, values, returns, held) * counts).sum().view(1)
