"""What transformers does at random in training is off: the loss is a function of the weights and the batch."""

from __future__ import annotations

import pytest

from training.config import Model
from training.model import load_config

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PhimoeConfig", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.2, "attention_dropout": 0.1}),
        ("OPTConfig", {"dropout": 0.1, "layerdrop": 0.3}),
        ("GPT2Config", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    ],
)
def test_noise_is_off(kind, settings, tmp_path):
    import transformers

    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    config = load_config(Model(path=str(tmp_path)))
    assert {name: getattr(config, name) for name in settings} == dict.fromkeys(settings, 0.0)


def test_noise_of_a_part_of_a_model_is_off(tmp_path):
    from transformers import Gemma3Config

    Gemma3Config(text_config={"attention_dropout": 0.2}).save_pretrained(tmp_path)
    assert load_config(Model(path=str(tmp_path))).text_config.attention_dropout == 0.0
