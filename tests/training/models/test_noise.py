"""What transformers does at random in training is off: the loss is a function of the weights and the batch."""

from __future__ import annotations

import json

import pytest

from benchmarks import tiny_models
from training.config import SFT, Model
from training.models.loading import load, load_config

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LlamaConfig", {"attention_dropout": 0.1}),
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


@pytest.mark.parametrize(
    ("model_type", "noise"), [("mixtral", {"router_jitter_noise": 0.3}), ("phimoe", {"input_jitter_noise": 0.3})]
)
def test_routers_send_tokens_to_experts_in_training_as_in_evaluation(model_type, noise, tmp_path):
    """The router of phimoe draws experts at random in training; its `router_jitter_noise` is no noise,
    but a threshold of its choice."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny_models.make(model_type, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | noise))
    model = {"path": str(tmp_path), "dtype": "fp32", "attention": "eager"}
    phase = SFT.model_validate({"recipe": "sft", "model": model, "data": {"train": "rows.jsonl"}})
    lm = load(phase, torch.float32, "cpu")
    lm.train()  # as an engine does after every evaluation
    ids = torch.arange(3, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(lm(input_ids=ids, use_cache=False).logits, expected(input_ids=ids, use_cache=False).logits)
