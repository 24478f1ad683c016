"""The modules that policy and critic train: log-probabilities or values when asked for them,
else sums of losses to learn from.

Shapes: R rows, L places in a row, N response tokens, as in training/rl/experience.py.
`counts` is 0 where a worker had nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.config import PPO
from training.models.chunked_logits import apply_head_chunked
from training.models.scoring import scores
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
        old: Tensor | None = None, advantages: Tensor | None = None, reference: Tensor | None = None,
        beta: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Without `old` the log-probabilities of the N tokens at the temperature of the rollout. [N]

        With it the sums of `measures` over them, the loss first. [4]
        With `beta` the KL to `reference` is part of the loss.
        `importance`: how much each token's loss counts.
        """
        self.ready()
        phase = self.phase
        places = (self.lm, input_ids, position_ids, target_index)
        tokens_N = target_ids.clamp(min=0)
        if old is None or advantages is None:
            return apply_head_chunked(*places, self._log_probs, tokens_N)[:, 0]
        log_probs_N, entropies_N = apply_head_chunked(*places, self._log_probs_and_entropies, tokens_N).unbind(-1)
        terms_N, clipped_N = policy_terms(log_probs_N, old, advantages, phase.clip_range)
        if importance is not None:
            terms_N = terms_N * importance
        if phase.entropy > 0:
            terms_N = terms_N - phase.entropy * entropies_N
        if reference is not None and beta is not None:
            terms_N = terms_N + beta * k3(log_probs_N, reference)
        approx_kl_N = k3(log_probs_N.detach(), old)
        return torch.stack([(each * counts).sum() for each in (terms_N, clipped_N, approx_kl_N, entropies_N)])

    def _log_probs(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """[N, 1]"""
        return token_log_probs(logits_NV, tokens_N, self.phase.temperature)[:, None]

    def _log_probs_and_entropies(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """[N, 2]"""
        log_probs_N1 = self._log_probs(logits_NV, tokens_N)
        with torch.set_grad_enabled(self.phase.entropy > 0 and torch.is_grad_enabled()):
            entropies_N = entropies(logits_NV, self.phase.temperature)
        return torch.cat([log_probs_N1, entropies_N[:, None]], dim=1)


class ValueLoss(_OfTokens):
    """A sequence classifier with one label as a critic: its head read at every place that a token follows."""

    measures = ("value_loss",)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, target_index: Tensor, target_ids: Tensor, counts: Tensor,
        values: Tensor | None = None, returns: Tensor | None = None, clip: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Without `returns` the value of what stands before each of the N tokens. [N]  With them the summed loss,
        clipped or not. [1]"""
        self.ready()
        values_N = scores(self.lm, input_ids, position_ids, target_index)
        if values is None or returns is None:
            return values_N
        held = None if clip is None else float(clip)
        return (value_terms(values_N, values, returns, held) * counts).sum().view(1)
