"""Loads a causal language model, and states what is learnt from it: the sum of the loss over target tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from training.config import Model
from training.errors import InputError, Problem

# Models whose logits are not simply head(hidden): they say so in one of these settings.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def resolve_dtype(setting: str, device: str) -> torch.dtype:
    """The type of the computation. auto: bf16 where the hardware multiplies it, else fp32."""
    if setting == "auto":
        setting = "bf16" if _multiplies_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[setting]


def _multiplies_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def load(model: Model, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with its weights, in `dtype`, dropout off. Raises InputError if it cannot be loaded.

    Weights are read from safetensors only: pickled weights can run code.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    attention = resolve_attention(model.attention, device)
    try:
        config = load_config(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, all at once
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError.of(model.path, f"cannot load the model: {error}", "model") from error
    lm, info = loaded
    refuse_holes(model.path, info)
    if model.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.train()
    return lm


def refuse_holes(path: str, info: Mapping[str, Any]) -> None:
    """Raises InputError if weights are missing or of another shape: transformers would go on with random ones."""
    missing = sorted(info["missing_keys"])
    misfits = sorted(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])
    problems = []
    for keys, what in ((missing, "are not in the weights"), (misfits, "have another shape than config.json says")):
        if keys:
            named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            problems.append(Problem(path, "model", f"{named} {what}; copy the model again or correct config.json"))
    if problems:
        raise InputError(problems)


def load_config(model: Model) -> Any:
    """The model's configuration with every dropout set to 0."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False
    return config


def resolve_attention(setting: str, device: str) -> str:
    """The attention kernel. auto: flash attention on GPUs that have it installed, else sdpa."""
    if setting != "auto":
        return setting
    if device == "cuda":
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


class TokenLoss(nn.Module):
    """A causal language model that returns the loss it is trained on, summed, not averaged.

    Averaging is the caller's: it alone knows how many targets the global batch has over all workers.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        config: Any = lm.config
        self.plain_head = not any(getattr(config, key, None) for key in _LOGIT_TRANSFORMS)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, target_index: Tensor, target_ids: Tensor
    ) -> Tensor:
        """Sum over the N targets of -log p(target). []  Shapes as in training/data/collate.py."""
        lm: Any = self.lm
        if self.plain_head:
            # Only the places whose next token is a target go through the head: prompts cost no logits.
            hidden_RLH = lm.get_decoder()(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            logits_NV = lm.get_output_embeddings()(hidden_RLH.flatten(0, 1)[target_index])
        else:
            logits_RLV = lm(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            logits_NV = logits_RLV.flatten(0, 1)[target_index]
        return functional.cross_entropy(logits_NV.float(), target_ids, reduction="sum")
