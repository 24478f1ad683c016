"""Which layers of a model get adapters: the linear ones, by ends of their names
that no other module has and that PEFT accepts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from training.models.peft_compat import refuses_layer

_BASE = ".base_layer"
_READ_PAST = frozenset({"correction_coefs"})
"""Linear layers of Gemma 3n whose weights its code reads past the layer
in training: an adapter there would learn nothing."""


def linear_layers(lm: nn.Module) -> list[str]:
    """Names of all linear layers, as they are called without adapters."""
    return [
        name.removesuffix(_BASE) for name, module in lm.named_modules() if _is_linear(module) and ".lora_" not in name
    ]


def _is_linear(module: nn.Module) -> bool:
    """Not so the routers of some models, which are linear layers by their class and answer with more than a product."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and "Router" not in type(module).__name__


def body_layers(lm: Any) -> list[str]:
    """The linear layers without the heads."""
    linear = linear_layers(lm)
    body = [name for name in linear if name.startswith(f"{lm.base_model_prefix}.")]
    head = lm.get_output_embeddings()
    return body or [name for name in linear if lm.get_submodule(name) is not head]


def all_linear(lm: Any) -> tuple[list[str], list[str]]:
    """Ends of the names of the layers that get adapters, and of those whose adapters would be lost."""
    body = body_layers(lm)
    ends = ends_of(body, (name for name, _ in lm.named_modules()))
    renamed = _renamed(lm, body)
    refused = [
        end
        for end in ends
        if end in _READ_PAST or refuses_layer(lm, end) or any(_has_end(name, end) for name in renamed)
    ]
    return [end for end in ends if end not in refused], refused


def left_out(lm: Any) -> str:
    """What a user should know of linear layers that all-linear leaves out; nothing if there are none."""
    ends, refused = all_linear(lm)
    if not refused:
        return ""
    return (
        f"model.lora.targets all-linear trains no adapters on {', '.join(refused)}: in a model of type "
        f"{lm.config.model_type} they would have no effect, or PEFT could not load them; it trains adapters on "
        f"{', '.join(ends)}"
    )


def ends_of(layers: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of names, in whole parts, that these layers have and no other of the modules."""
    others = set(modules) - set(layers)
    taken = {end for name in others for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in taken), name) for name in layers})


def _ends(name: str) -> Iterator[str]:
    """`c`, `b.c`, `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def _renamed(lm: Any, layers: Sequence[str]) -> list[str]:
    """Layers whose names PEFT changes when it loads an adapter,
    as transformers changes the older names of their weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in get_model_conversion_mapping(lm) if isinstance(each, WeightRenaming)]
    return [name for name in layers if rename_source_key(f"{name}.weight", renamings, [])[0] != f"{name}.weight"]


def _has_end(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
