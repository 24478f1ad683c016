"""What Muster reads of transformers that transformers does not promise: private attributes, one function each.

tests/training/estimate/test_transformers_compat.py says what each relies on. Loads nothing by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_FLAGS = {
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
"""Class attributes of models, by attention kernel."""
GPU_KERNELS = tuple(_FLAGS)
"""Kernels that need a GPU, so that what the class of a model declares is all that can be known without one."""


def attention_in_use(lm: Any) -> str:
    """Return the attention kernel that a model computes with. Private: `config._attn_implementation`."""
    return str(lm.config._attn_implementation)


def declares_kernel(lm: Any, name: str) -> bool:
    """Return whether the class of a model declares one of GPU_KERNELS.

    Private: `_supports_flash_attn`, `_supports_flex_attn`.
    """
    return bool(getattr(lm, _FLAGS[name], False))


def accepts_own_kernels(lm: Any) -> bool:
    """Return whether a model calls attention through the registry, where Muster's kernel is. Private:
    `_supports_attention_backend`."""
    return bool(lm._supports_attention_backend)


@contextmanager
def unsharded() -> Iterator[None]:
    """Within the block transformers does not shard the models that it makes, although the process trains under ZeRO-3.

    Private: `transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref`, which is put back afterwards.
    """
    deepspeed: Any = sys.modules.get("transformers.integrations.deepspeed")
    sharding = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    if sharding is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            deepspeed._hf_deepspeed_config_weak_ref = sharding
