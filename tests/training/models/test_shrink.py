"""Small copies of models: every causal architecture gets one, with all kinds of its layers."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.cpu

_WITHOUT_DEFAULT = {"dots3_note", "gemma4_assistant"}
"""Types of which transformers itself makes no model, or none without further settings."""


def _config(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **settings)


def test_the_default_configurations_of_causal_types_shrink():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from training.models.shrink import shrunk

    every_third = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - _WITHOUT_DEFAULT)[
        ::3
    ]  # all of them take a quarter of a minute
    for kind in every_third:
        small = shrunk(_config(kind))
        assert getattr(small, "vocab_size", 0) <= 256 or kind in ("blt", "whisper"), kind


@pytest.mark.parametrize(
    ("kind", "settings", "kept"),
    [
        ("gemma3_text", {}, ["sliding_attention"] * 5 + ["full_attention"]),
        ("bamba", {"attn_layer_indices": [9, 18, 27]}, ["linear_attention", "linear_attention", "full_attention"]),
        ("qwen3_next", {}, ["linear_attention"] * 3 + ["full_attention"]),
    ],
)
def test_a_small_copy_has_every_kind_of_layer(kind, settings, kept):
    from training.models.shrink import shrunk

    assert shrunk(_config(kind, **settings)).layer_types == kept


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "falcon", "deepseek_v3", "mamba", "jamba", "llama4_text"])
def test_a_small_copy_computes_and_is_small(kind):
    import torch
    from transformers import AutoModelForCausalLM

    from training.models.shrink import shrunk, small_model

    lm = small_model(shrunk(_config(kind)), AutoModelForCausalLM, "eager")
    with torch.no_grad():
        logits = lm(input_ids=torch.arange(3, 23)[None], use_cache=False).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05  # the weights matter
    assert sum(parameter.numel() for parameter in lm.parameters()) < 1_000_000


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_small_copies_of_a_configuration_are_the_same(kind):
    """Also where a class draws some of its weights by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    from training.models.shrink import shrunk, small_model

    torch.manual_seed(1)
    one, other = (small_model(shrunk(_config(kind)), AutoModelForCausalLM, "eager").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rotary_settings_keep_their_kind_and_fit_the_small_heads():
    from training.models.shrink import ROTARY_LIMIT, shrunk

    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48,
        "long_factor": [float(i) for i in range(1, 49)],
        "factor": 32.0,
    }
    rope = shrunk(_config("phi3", rope_parameters=longrope)).rope_parameters
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("longrope", ROTARY_LIMIT)
    assert len(rope["long_factor"]) == len(rope["short_factor"]) == 4
    dynamic = shrunk(_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    assert dynamic.max_position_embeddings == ROTARY_LIMIT
