"""One frozen base under several roles of a process, each with adapters of its own in it: PPO
in the memory of one model.

That is what LoRA is for; under ZeRO-3, where two engines cannot share parameters, every role has a base of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.config import PPO, Lora
from training.device import torch_device
from training.model_folder import SCORE, adapter_in, base_of
from training.models import loading as models
from training.models import lora
from training.process.distributed import RankInfo

_bases: dict[tuple[str, torch.dtype], Any] = {}
"""Of this process, by where they come from and their type."""

Ready = Callable[[], None]


def at_once() -> None:
    """Nothing has to be done before a model of one's own computes."""


def policy_model(
    phase: PPO, dtype: torch.dtype, rank_info: RankInfo, name: str, *, classifier: bool = False
) -> tuple[nn.Module, Ready]:
    """The model of a phase for one role, and what to call before it computes. `name`: of the role's adapters."""
    if not _shares_base(phase):
        return models.load(phase, dtype, rank_info.device, classifier=classifier), at_once
    lm = _base(phase, dtype, rank_info)
    existing = adapter_in(phase.model.path)
    lora.add(lm, phase, existing, name)
    if classifier:
        models.set_head(lm, phase, existing, fresh=existing is None or not existing.heads)

    def ready() -> None:
        lora.activate(lm, name)
        if classifier:  # whoever joined later has frozen it
            models.head_of(lm).requires_grad_(True)

    return lm, ready


def reference_model(phase: PPO, dtype: torch.dtype, rank_info: RankInfo) -> tuple[nn.Module, Ready]:
    """The model that a phase starts from, to compare with: where bases are shared
    with its adapters switched off, or as they were."""
    if not _shares_base(phase):
        whole = phase.model_copy(update={"model": phase.model.model_copy(update={"lora": None})})
        return models.load(whole, dtype, rank_info.device), at_once
    lm = _base(phase, dtype, rank_info)
    existing = adapter_in(phase.model.path)
    if existing is None:
        return lm, lambda: lora.activate(lm, None)
    lora.add(lm, phase, existing, "reference")
    return lm, lambda: lora.activate(lm, "reference")


def _shares_base(phase: PPO) -> bool:
    """Not where an adapter brings an embedding or a head: the roles would train the same one."""
    existing = adapter_in(phase.model.path)
    return phase.shares_base and not (existing is not None and existing.whole)


def reward_model(path: str, phase: PPO, rank_info: RankInfo) -> tuple[nn.Module, nn.Module | None, Ready]:
    """A reward model to ask, its head (None: the model's own), and what to call before it computes.

    One that is an adapter in the policy's base takes the memory of the adapter alone.
    """
    adapter = adapter_in(path)
    if (
        adapter is None
        or adapter.whole
        or not _shares_base(phase)
        or adapter.base != base_of(phase.model.path)
        or SCORE not in adapter.heads
    ):
        trust = phase.model.trust_remote_code
        lm = models.for_inference(path, classifier=True, gpu=rank_info.local_rank, trust_remote_code=trust)
        return lm, None, at_once
    dtype = models.resolve_dtype(phase.model.dtype, rank_info.device)
    lm = _base(phase, torch.float32 if phase.sharding.stage == 0 else dtype, rank_info)
    name = f"reward{len(_heads)}"
    settings = phase.model.model_copy(update={"path": path, "lora": Lora(rank=adapter.rank, alpha=adapter.alpha)})
    lora.add(lm, phase.model_copy(update={"model": settings}), adapter, name)
    weight = lora.head_in(adapter, SCORE)
    parameter = next(lm.parameters())
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=parameter.dtype, device=parameter.device)
    head.weight.data.copy_(weight)
    _heads.append(head)
    return lm, head, lambda: lora.activate(lm, name)


_heads: list[nn.Module] = []
"""Of the reward models in shared bases."""


def _base(phase: PPO, dtype: torch.dtype, rank_info: RankInfo) -> Any:
    key = (base_of(phase.model.path), dtype)
    if key not in _bases:
        settings = phase.model.model_copy(update={"path": key[0]})
        lm, _ = models.pretrained(settings, dtype, rank_info.device, classifier=False)
        for parameter in lm.parameters():
            parameter.requires_grad = False
        _bases[key] = lm.to(torch_device(rank_info.device, rank_info.local_rank))
    return _bases[key]
