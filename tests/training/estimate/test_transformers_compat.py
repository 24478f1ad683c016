"""What Muster relies on in models of transformers without a promise, in the version that is installed."""

from __future__ import annotations

import pytest

from training.estimate import transformers_compat

pytestmark = pytest.mark.cpu


def test_a_model_declares_its_kernels_and_names_the_one_that_it_uses():
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=8, attn_implementation="eager",
    )  # fmt: skip
    lm = LlamaForCausalLM(config)
    assert transformers_compat.attention_in_use(lm) == "eager"
    lm.set_attn_implementation("sdpa")
    assert transformers_compat.attention_in_use(lm) == "sdpa"
    assert transformers_compat.accepts_own_kernels(lm)
    for name in transformers_compat.GPU_KERNELS:
        assert transformers_compat.declares_kernel(lm, name)
        assert not transformers_compat.declares_kernel(PreTrainedModel, name)


def test_transformers_shards_no_model_within_the_block_and_again_after_it():
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    sharding = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with transformers_compat.unsharded():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    del sharding
