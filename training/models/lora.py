"""LoRA (arXiv:2106.09685) through PEFT: adapters added to a model's layers, read from and written for PEFT folders.

Adapters stand inside the model, whose class stays what it was: `q_proj` becomes a layer that holds the frozen
`q_proj.base_layer` and, trained, `q_proj.lora_A.default` and `q_proj.lora_B.default`. A PEFT folder calls the same
tensors `base_model.model.<...>.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.config import Lora, Phase
from training.engine.deepspeed_compat import whole_shape
from training.engine.engine import whole
from training.errors import InputError
from training.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EMBEDDING,
    PEFT_PREFIX,
    TOKEN_HEADS,
    Adapter,
    adapter_in,
    base_of,
    check_continues,
    merge_first,
    on_hub,
    unmatched,
)
from training.models import lora_targets as targets
from training.models.layout import empty_model
from training.seeding import seed_for

NAME = "default"
_BASE = ".base_layer"
_SHOWN = 200
"""Characters of what PEFT says."""


def add(lm: nn.Module, phase: Phase, existing: Adapter | None, name: str = NAME) -> None:
    """Freeze the model and put adapters into it: fresh ones, or those of a folder to be trained on.
    They are active from now on.

    `name` tells several of them apart in one model. Raises InputError for targets that match no layer, and for an
    adapter of another shape than the settings say.
    """
    check_continues(phase.model)
    inject(lm, phase, existing, name)
    _initialize(lm, phase.seed, name)
    if existing is not None:
        _load(lm, existing, name)
        train_whole(lm, existing.whole)


def activate(lm: nn.Module, name: str | None) -> None:
    """Compute with the adapters of this name from now on, or with none of them. Only these are trainable then."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in lm.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)


def inject(lm: nn.Module, phase: Phase, existing: Adapter | None, name: str = NAME) -> None:
    """The same without values in the adapters."""
    from peft import inject_adapter_in_model

    settings = phase.model.lora
    assert settings is not None, "a phase that asks for adapters"
    wanted: list[str] | str = existing.targets if existing is not None else targets_in(lm, settings)
    for parameter in lm.parameters():
        parameter.requires_grad = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        try:
            inject_adapter_in_model(config_for(settings, wanted), lm, adapter_name=name)
        except ValueError as error:
            raise InputError.of("", _refused_by_peft(lm, error), "model.lora.targets") from error


def _refused_by_peft(lm: Any, error: ValueError) -> str:
    said = " ".join(str(error).split())[:_SHOWN]
    return f"PEFT gives these layers no adapters: {said}; choose among {', '.join(targets.all_linear(lm)[0])}"


def config_for(settings: Lora, targets: list[str] | str, **more: Any) -> Any:
    """PEFT's own settings of the same adapter."""
    from peft import LoraConfig

    alpha: Any = settings.alpha  # a float will do, too
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, **more)


def targets_in(lm: Any, settings: Lora) -> list[str]:
    """Ends of the names of the layers that get adapters. Raises InputError if one of the settings matches no layer."""
    if settings.targets == "all-linear":
        return targets.all_linear(lm)[0]
    if problems := unmatched(settings.targets, targets.linear_layers(lm)):
        raise InputError.of("", "\n".join(problems), "model.lora.targets")
    return list(settings.targets)


def left_out(lm: nn.Module, settings: Lora | None) -> list[str]:
    """What a user should know of weights that all-linear leaves out: experts in one tensor are no linear layers."""
    if settings is None or settings.targets != "all-linear":
        return []
    sizes = {
        name: math.prod(shape)
        for name, parameter in lm.named_parameters()
        if len(shape := whole_shape(parameter)) == 3 and not _is_convolution(lm, name)
    }
    notes = [targets.left_out(lm)]
    if sizes:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in sizes}))
        notes.append(
            f"model.lora.targets all-linear trains no adapters on the experts ({ends}, {sum(sizes.values()):,} "
            "parameters): they are no linear layers of the model; it trains adapters on "
            f"{', '.join(targets_in(lm, settings))}"
        )
    return [note for note in notes if note]


def _is_convolution(lm: nn.Module, weight: str) -> bool:
    return isinstance(lm.get_submodule(weight.rpartition(".")[0]), nn.Conv1d)


def _adapters(lm: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the adapters of one name, by the names that they would have alone."""
    for name, parameter in lm.named_parameters():
        if ".lora_" in name and f".{adapter}." in name:
            yield alone(name, adapter), parameter


def alone(name: str, adapter: str) -> str:
    """What a parameter is called where its adapter is the only one."""
    return name.replace(f".{adapter}.", f".{NAME}.") if ".lora_" in name else name


def _initialize(lm: nn.Module, seed: int, adapter: str) -> None:
    """A as Kaiming says, B zero (the paper's start: nothing is added).
    By name, so that it is the same on all machines."""
    for name, parameter in _adapters(lm, adapter):
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed_for(seed, "lora", name))
            bound = math.sqrt(1 / parameter.shape[1])  # kaiming_uniform with a = sqrt(5)
            values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
        else:
            values = torch.zeros(parameter.shape)
        parameter.data.copy_(values)


def _load(lm: nn.Module, existing: Adapter, adapter: str) -> None:
    saved = load_file(existing.folder / ADAPTER_WEIGHTS)
    there = {peft_name(name): parameter for name, parameter in _adapters(lm, adapter)}
    unlike = sorted({name for name in saved if ".lora_" in name} ^ there.keys())
    if unlike:
        raise InputError.of(
            str(existing.folder),
            f"is an adapter for another model: {len(unlike)} of its tensors and the model's layers have no counterpart "
            f"({', '.join(unlike[:3])}); {merge_first(existing.folder)}",
        )
    for name, parameter in there.items():
        parameter.data.copy_(saved[name])


def train_whole(lm: nn.Module, names: Iterable[str]) -> None:
    """Train these parameters beside the adapters: an embedding or a head that gets new tokens,
    or that an adapter brings."""
    parameters = dict(lm.named_parameters())
    for name in names:
        if name in parameters:  # the head of a tied model is its embedding, a reward model has none
            parameters[name].requires_grad = True


def token_parameters(lm: Any) -> list[str]:
    """Names of what has a row for each token: embedding and head."""
    modules = [module for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module is not None]
    ids = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in lm.named_parameters() if id(parameter) in ids]


def put_whole(lm: nn.Module, adapter: Adapter) -> None:
    """Put the embedding and the head that an adapter brings into the model, which has as many rows as they.
    ZeRO-3 may have sharded it."""
    saved = load_file(adapter.folder / ADAPTER_WEIGHTS)
    parameters = dict(lm.named_parameters())
    for name in adapter.whole:
        if (parameter := parameters.get(name)) is None:
            continue
        with whole(parameter):
            if parameter.numel():  # not on a worker that holds none of it
                parameter.data.copy_(saved[PEFT_PREFIX + name])


def peft_name(name: str) -> str:
    """What a PEFT folder calls a parameter of the model."""
    return PEFT_PREFIX + name.replace(f".{NAME}.", ".")


def deltas(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """What merging adds to the weights: name of the weight and the change [out, in], fp32."""
    saved = load_file(adapter.folder / ADAPTER_WEIGHTS)
    for name, down in saved.items():
        if name.endswith(".lora_A.weight"):
            up = saved[name.replace(".lora_A.", ".lora_B.")]
            yield name.removeprefix(PEFT_PREFIX).replace(".lora_A.", "."), delta(down, up, adapter.alpha / adapter.rank)


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The change of a weight, in fp32. [r, in], [out, r] -> [out, in]"""
    return scale * (up.float() @ down.float())


def head_in(adapter: Adapter, name: str) -> Tensor:
    """The weights of a head that was trained whole beside an adapter. [labels, d]"""
    return load_file(adapter.folder / ADAPTER_WEIGHTS)[f"{PEFT_PREFIX}{name}.weight"]


def merge(lm: nn.Module, adapter: Adapter) -> None:
    """Add an adapter to the weights for good. Works on weights that ZeRO-3 has sharded, too."""
    weights = dict(lm.named_parameters())
    for name, change in deltas(adapter):
        if name not in weights:
            if name.endswith(TOKEN_HEADS):  # a reward model has none
                continue
            message = f"is an adapter for another model: there is no {name}; {merge_first(adapter.folder)}"
            raise InputError.of(str(adapter.folder), message)
        weight = weights[name]
        with whole(weight):
            weight.data += (change.T if _is_transposed(lm, name) else change).to(weight.dtype).to(weight.device)


def _is_transposed(lm: nn.Module, weight: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(lm.get_submodule(weight.rpartition(".")[0]), Conv1D)


def write_folder(folder: Path, weights: dict[str, Tensor], phase: Phase, *, classifier: bool) -> None:
    """A PEFT folder of a phase's trained parameters, by the model's own names."""
    from safetensors.torch import save_file

    weights = _with_tied_head(weights, phase, classifier)
    saved = {peft_name(name): tensor for name, tensor in weights.items()}
    save_file(saved, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings, existing = phase.model.lora, adapter_in(phase.model.path)
    assert settings is not None, "a phase that has trained adapters"
    wanted: list[str] | str
    if existing is not None:
        wanted = existing.targets
    elif settings.targets == "all-linear":
        wanted = _ends(weights, phase, classifier)
    else:
        wanted = sorted(settings.targets)
    heads = sorted({name.split(".")[-2] for name in weights if ".lora_" not in name})
    base, revision = phase.model.path, phase.model.revision
    if existing is not None:
        base = existing.base_name if on_hub(existing.base_name) else existing.base
        revision = revision or existing.revision
    config = config_for(
        settings,
        wanted,
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        modules_to_save=heads or None,
        base_model_name_or_path=base,
        revision=revision if on_hub(base) else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    file = folder / ADAPTER_CONFIG
    written = json.loads(file.read_text())
    file.write_text(
        json.dumps({**written, "target_modules": wanted}, indent=2, sort_keys=True) + "\n"
    )  # PEFT has a set


def _ends(weights: Iterable[str], phase: Phase, classifier: bool) -> list[str]:
    """What PEFT finds the layers by that have adapters, and no others."""
    layers = [name.partition(".lora_A.")[0] for name in weights if ".lora_A." in name]
    return targets.ends_of(layers, (name for name, _ in _without_weights(phase, classifier).named_modules()))


def _with_tied_head(weights: dict[str, Tensor], phase: Phase, classifier: bool) -> dict[str, Tensor]:
    """Of a model with one tensor for embedding and head both, if it was trained: PEFT keeps them
    apart when it loads them."""
    embedding = next((name for name in weights if EMBEDDING.search(name)), None)
    if embedding is None or classifier or any(name.endswith(TOKEN_HEADS) for name in weights):
        return weights
    lm = _without_weights(phase)
    head = lm.get_output_embeddings()
    if head.weight is not lm.get_input_embeddings().weight:
        return weights  # the head was not trained
    name = next(name for name, module in lm.named_modules() if module is head)
    return {**weights, f"{name}.weight": weights[embedding].clone()}


def transposed_in(phase: Phase) -> set[str]:
    """Names of the weights of a phase's model that lie as [in, out], as GPT-2's do."""
    lm = _without_weights(phase)
    return {name for name, _ in lm.named_parameters() if name.endswith(".weight") and _is_transposed(lm, name)}


def _without_weights(phase: Phase, classifier: bool = False) -> Any:
    """The model of a phase, or the one below its adapter, in no memory."""
    return empty_model(phase.model.model_copy(update={"path": base_of(phase.model.path)}), classifier=classifier)


def base_name(name: str) -> str:
    """The weight's name in the model without adapters."""
    return name.replace(f"{_BASE}.", ".")
