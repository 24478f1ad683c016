"""Loads the model that a phase trains, and states what is learnt from tokens: the sum of the loss
over those that are targets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from training.config import Model, Phase
from training.data.vocabulary import tokenizer_rows
from training.device import device_type, is_accelerator, is_available, multiplies_bf16, torch_device
from training.engine.deepspeed_compat import whole_shape
from training.engine.engine import whole
from training.errors import InputError, Problem
from training.estimate.model_traits import Traits, attention_of
from training.estimate.parameters import BUFFERS
from training.model_folder import SCORE as HEAD
from training.model_folder import (
    TOKEN_HEADS,
    Adapter,
    adapter_in,
    auxiliary_loss,
    base_of,
    described_holes,
    described_quantization,
)
from training.models import attention, kernels, lora
from training.models.chunked_logits import apply_head_chunked
from training.models.embedding import grow
from training.models.probe import traits_for
from training.process.cpu_features import cpu_multiplies_bf16
from training.seeding import seed_for

_SHOWN = 3
"""Tensors that a message names."""
_NOISE = re.compile(r"dropout|pdrop$|layerdrop|drop_path")
"""Settings of how much is left out at random: of activations, or whole layers."""
_ROUTES = re.compile(r"Router|(Moe|MoE)Block")
"""Classes of transformers that choose experts."""


def resolve_dtype(setting: str, device: str) -> torch.dtype:
    """The type of the computation. auto: bf16 where the hardware multiplies it, else fp32."""
    if setting == "auto":
        setting = "bf16" if _multiplies_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[setting]


def _multiplies_bf16(device: str) -> bool:
    return multiplies_bf16() if is_accelerator(device) else cpu_multiplies_bf16()


def load(phase: Phase, dtype: torch.dtype, device: str, *, classifier: bool = False) -> nn.Module:
    """The model that a phase trains, with its weights in `dtype`, dropout off;
    with LoRA only its adapters are trainable.

    `classifier`: with a scalar head instead of the one for tokens. A phase that starts from an adapter trains that one
    on, or without `model.lora` all weights with it merged in. Raises InputError if it cannot be loaded.
    """
    adapter = adapter_in(phase.model.path)
    settings = phase.model.model_copy(update={"path": base_of(phase.model.path)})
    _refuse_quantized(settings)
    lm, fresh_head = pretrained(settings, dtype, device, classifier=classifier)
    if adapter is not None:
        _bring_rows(lm, adapter)
    grows = phase.model.resize_embedding == "auto" and grow(lm, tokenizer_rows(phase.model))
    if adapter is not None and phase.model.lora is None:
        lora.merge(lm, adapter)
    elif phase.model.lora is not None:
        of_tokens = lora.token_parameters(lm) if grows else []
        lora.add(lm, phase, adapter)
        lora.train_whole(lm, of_tokens)
    if classifier:
        set_head(lm, phase, adapter, fresh=fresh_head)
    _keep_routers_still(lm)
    lm.train()
    loaded: nn.Module = lm
    return loaded


def _refuse_quantized(model: Model) -> None:
    """Raises InputError for weights that cannot be trained, also of a model on the hub."""
    settings = getattr(load_config(model), "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is not None and not (method == "bitsandbytes" and model.lora is not None and model.lora.bits == 4):
        raise InputError.of(model.path, described_quantization(str(method)), "model")


def _keep_routers_still(lm: nn.Module) -> None:
    """Have routers send tokens to experts as in evaluation, always: some disturb or draw at random in training."""
    for module in lm.modules():
        if _ROUTES.search(type(module).__name__):
            module.train = partial(_evaluates, module)  # type: ignore[method-assign]  # of this module alone


def _evaluates(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train`, which a model calls of its parts."""
    return nn.Module.train(module, False)


def for_inference(path: str, *, classifier: bool = False, gpu: int = 0, trust_remote_code: bool = False) -> nn.Module:
    """A model to ask, in the type that it is stored in, on GPU number `gpu` if there are GPUs; an adapter is merged in.

    `trust_remote_code`: whether Python code that comes with the model may run.
    """
    kind = device_type(is_available())
    adapter = adapter_in(path)
    dtype: Any = "auto" if kind == "cpu" else resolve_dtype("auto", kind)
    revision = adapter.revision if adapter is not None else None
    base = Model(path=base_of(path), revision=revision, trust_remote_code=trust_remote_code)
    lm, fresh_head = pretrained(base, dtype, kind, classifier=classifier)
    brings_head = adapter is not None and HEAD in adapter.heads
    if fresh_head and not brings_head:
        raise InputError.of(path, f"is no reward model: it has no scalar head `{HEAD}`; the recipe `reward` trains one")
    if adapter is not None:
        _bring_rows(lm, adapter)
        lora.merge(lm, adapter)
        if classifier and brings_head:
            weight: Any = head_of(lm).weight
            weight.data.copy_(lora.head_in(adapter, HEAD))
    placed: nn.Module = lm.to(torch_device(kind, gpu)).eval()
    return placed


def _bring_rows(lm: Any, adapter: Adapter) -> None:
    """The embedding and the head that an adapter brings, in place of the model's own."""
    if adapter.embedding_rows is not None:
        grow(lm, adapter.embedding_rows)
    lora.put_whole(lm, adapter)


def skeleton(phase: Phase, dtype: torch.dtype, device: str) -> nn.Module:
    """The causal language model that `load` gives, without the memory of its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    settings = phase.model.model_copy(update={"path": base_of(phase.model.path)})
    config = load_config(settings)
    attention.register()
    with init_empty_weights(include_buffers=False):
        lm: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=kernel_of(settings, device),
            trust_remote_code=settings.trust_remote_code,
        )
        _tell_traits(lm, settings)
        if phase.model.lora is not None:
            lora.inject(lm, phase, adapter_in(phase.model.path))
    for module in lm.modules():  # parameters are nowhere; buffers are computed, so they are here
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    bare: nn.Module = lm
    return bare


def pretrained(model: Model, dtype: torch.dtype | str, device: str, *, classifier: bool) -> tuple[Any, bool]:
    """The model as its folder has it, and whether its scalar head is still to be made.

    Weights are read from safetensors only: pickled weights can run code.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is missing or new is told below
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    attention.register()
    config = load_config(model)
    if classifier:
        config.num_labels = 1
    try:
        loaded: Any = kind.from_pretrained(
            model.path,
            config=config,
            dtype=dtype,
            attn_implementation=kernel_of(model, device),
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, all at once
            **_quantized(model, device),
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError.of(model.path, f"cannot load the model: {error}", "model") from error
    lm, info = loaded
    _tell_traits(lm, model)
    if kernels.resolve(model, device, lambda: config.model_type) == "liger":
        kernels.fuse(lm)
    head = {f"{HEAD}.weight"} & set(info["missing_keys"]) if classifier else set()
    refuse_holes(model.path, {**info, "missing_keys": set(info["missing_keys"]) - head})
    lm.unused = sorted(
        name
        for name in info["unexpected_keys"]
        if not name.endswith(BUFFERS) and not (classifier and name.endswith(TOKEN_HEADS))
    )
    return lm, bool(head)


def notes_on_weights(lm: Any) -> list[str]:
    """What a user should know of how a model's weights and its configuration are used."""
    names: list[str] = getattr(lm, "unused", [])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    unused = f"of the weights {', '.join(names[:_SHOWN])}{more} are not used: the model has no such parameters"
    auxiliary = auxiliary_loss(lm.config.get_text_config().to_dict())
    return [note for note in (unused if names else "", auxiliary) if note]


def _quantized(model: Model, device: str) -> dict[str, Any]:
    """Settings for weights in 4 bits, where they are asked for."""
    if model.lora is None or model.lora.bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def head_of(lm: nn.Module) -> nn.Module:
    """The scalar head of a sequence classifier. Raises InputError for a model that calls it otherwise."""
    head = getattr(lm, HEAD, None)
    if not isinstance(head, nn.Linear):
        name = type(lm).__name__
        raise InputError.of(
            "", f"{name} has no linear head called `{HEAD}`; take a model of the kind of LLaMA", "model"
        )
    return head


def set_head(lm: nn.Module, phase: Phase, adapter: Adapter | None, *, fresh: bool) -> None:
    """The head of a new reward model: normal with standard deviation 1/sqrt(d+1)
    (arXiv:2009.01325), by the seed alone."""
    if not hasattr(lm, HEAD):  # a language model that is to be both
        config: Any = lm.config
        parameter = next(lm.parameters())
        head = nn.Linear(config.hidden_size, 1, bias=False, dtype=parameter.dtype, device=parameter.device)
        setattr(lm, HEAD, head)
    weight: Any = head_of(lm).weight
    weight.requires_grad = True
    shape = whole_shape(weight)
    if adapter is not None and HEAD in adapter.heads:
        values = lora.head_in(adapter, HEAD)
    elif fresh:
        generator = torch.Generator().manual_seed(seed_for(phase.seed, "reward head"))
        values = torch.randn(tuple(shape), generator=generator) / math.sqrt(shape[1] + 1)
    else:
        return
    with whole(weight):
        if weight.numel():  # not on a worker that holds none of it
            weight.data.copy_(values)


def refuse_holes(path: str, info: Mapping[str, Any]) -> None:
    """Raises InputError if weights are missing or of another shape: transformers would go on with random ones."""
    missing = sorted(info["missing_keys"])
    misfits = sorted(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])
    problems = [Problem(path, "model", message) for message in described_holes(missing, misfits)]
    if problems:
        raise InputError(problems)


def resolve_kernels(model: Model, device: str) -> kernels.Kernels:
    """The kernels that `load` gives a model. Raises InputError if those that are asked for cannot be had."""
    return kernels.resolve(model, device, lambda: load_config(model).model_type)


def load_config(model: Model) -> Any:
    """The model's configuration with all that is random in training set to 0.
    Raises InputError if there is none to be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code, revision=model.revision or "main"
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError.of(model.path, f"cannot load the model: {error}", "model") from error
    _without_noise(config)
    config.use_cache = False
    return config


def _without_noise(config: Any) -> None:
    """Set what is random in training to 0, also in the settings of a part of the model: else the
    loss would depend on it."""
    for key, value in config.to_dict().items():
        if isinstance(value, dict) and hasattr(part := getattr(config, key, None), "to_dict"):
            _without_noise(part)
        elif isinstance(value, float) and _NOISE.search(key):
            setattr(config, key, 0.0)


def resolve_attention(model: Model, device: str) -> str:
    """The attention kernel that `load` gives a model."""
    return kernel_of(model.model_copy(update={"path": base_of(model.path)}), device)


def resolve_traits(model: Model) -> Traits:
    """What is known of a model, or of the one below an adapter."""
    return traits_for(model.model_copy(update={"path": base_of(model.path)}))


def kernel_of(model: Model, device: str) -> str:
    """The attention kernel of a model that is no adapter. Raises InputError if it cannot have the one that is set."""
    from transformers.utils import is_flash_attn_2_available

    return attention_of(model, traits_for(model), device, flash=is_accelerator(device) and is_flash_attn_2_available())


def _tell_traits(lm: Any, model: Model) -> None:
    """Let a model know its traits, and its rotary factors forget the lengths of earlier micro-batches."""
    lm.traits = traits_for(model)
    if lm.traits.rotary_limit is not None:
        for module in lm.modules():
            if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
                module.register_forward_pre_hook(_forget_lengths)


def _forget_lengths(rotary: Any, _: Any) -> None:
    """Dynamic rotary factors stay those of the longest sample so far, in transformers;
    here they are those of each micro-batch."""
    if rotary.max_seq_len_cached != rotary.original_max_seq_len:
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)


class TokenLoss(nn.Module):
    """A causal language model that returns the loss it is trained on, summed, not averaged.

    Averaging is the caller's: it alone knows how many targets the global batch has over all workers.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, target_index: Tensor, target_ids: Tensor
    ) -> Tensor:
        """Sum over the N targets of -log p(target). [1]  Shapes as in training/data/collate.py."""
        losses_N1 = apply_head_chunked(self.lm, input_ids, position_ids, target_index, _surprise, target_ids)
        return losses_N1.sum().view(1)


def _surprise(logits_NV: Tensor, target_ids: Tensor) -> Tensor:
    """-log p(target). [N, 1]; 0 where a target is to be left out."""
    return functional.cross_entropy(logits_NV.float(), target_ids, reduction="none")[:, None]
