"""Probes of models with small copies: what they find out, and that what is trained because of it
is what a row alone gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "n_layer": 2, "n_head": 4, "n_layers": 2, "n_heads": 4, "d_model": 32,
    "word_embed_proj_dim": 32, "n_embd": 32,
    "head_dim": 8, "max_position_embeddings": 128, "max_seq_len": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "layer_types": None,
    "intermediate_size_mlp": 48, "num_local_experts": 2, "state_size": 8, "time_step_rank": 4, "sliding_window": 8,
    "rotary_dim": 4,
}  # fmt: skip


def config_of(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    small = {name: value for name, value in SMALL.items() if name in known}
    return AutoConfig.for_model(kind, **(small | settings))


def found(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    from training.models.probe import probe

    return probe(AutoConfig.for_model(kind, **settings))


def model_in(folder: Path, config: Any, tokenizer: Path) -> Path:
    """A model of random weights that are large enough for attention to matter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
            elif "sink" in name:
                parameter.fill_(1.5)
    lm.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


def test_a_llama_takes_every_fast_way():
    known = found("llama")
    assert not known.unknown
    for kernel in ("eager", "sdpa", "sdpa_varlen"):
        assert known.packs(kernel)
        assert known.pads(kernel)
    assert known.packs("flash_attention_2")
    assert known.kernel("sdpa").trees
    assert known.kernel("sdpa_varlen").trees
    assert (known.body, known.last_mlp, known.classifier, known.generation) == (True, True, True, "batched")
    assert known.rotary_limit is None


@pytest.mark.parametrize("kind", ["opt", "falcon", "bloom", "mpt", "gpt_oss", "mamba", "bamba"])
def test_models_whose_packed_samples_see_each_other_are_found_out(kind):
    known = found(kind)
    assert not known.unknown
    assert not any(known.packs(kernel) for kernel in ("eager", "sdpa", "sdpa_varlen", "flash_attention_2"))
    assert known.pads("eager")


def test_a_mixture_of_experts_keeps_samples_apart_though_its_rounding_shows_them():
    assert found("mixtral").packs("sdpa")


def test_kernels_and_heads_that_a_model_does_not_have_are_found_out():
    gemma2 = found("gemma2")
    assert gemma2.usable("eager")
    assert not gemma2.usable("sdpa")
    assert not gemma2.body  # its logits are capped
    llama4 = found("llama4_text")
    assert not llama4.body  # what it calls its decoder is the whole model
    assert not llama4.classifier


def test_a_cache_that_is_a_little_wrong_is_found_out():
    """In transformers 5.23 zamba2's logits differ by a hundredth with one: its likeliest tokens are often the same."""
    assert found("zamba2").generation == "uncached"


def test_a_model_that_sees_later_tokens_is_found_out():
    assert not found("bert", is_decoder=False).causal
    assert found("bert", is_decoder=True).causal


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, None),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 64,
                "long_factor": [4.0] * 64,
            },
            32,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_rotary_factors_that_depend_on_the_longest_sample_are_found_out(rope, limit):
    assert found("llama", rope_parameters={"rope_theta": 1e4, **rope}).rotary_limit == limit


def test_a_model_that_cannot_be_made_small_goes_the_slow_way():
    from training.models.probe import probe

    config = config_of("llama")
    config.hidden_act = "an activation that nobody knows"
    known = probe(config)
    assert "nobody knows" in known.unknown
    assert not known.packs("eager")
    assert not known.pads("eager")
    assert not known.body
    assert known.generation == "uncached"


def alone(folder: Path, rows: list[dict[str, str]], phase: Any) -> float:
    """The mean loss of a target: every row by itself, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from training.data.phase_data import open_stores

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    store = open_stores(phase, Path("cache")).train
    total, count = 0.0, 0
    # From the shortest on: dynamic rotary factors stay those of the longest row so far.
    for ids, targets in sorted((store[i] for i in range(len(store))), key=lambda sample: len(sample[0])):
        row = torch.from_numpy(ids.astype("int64"))[None]
        with torch.no_grad():
            logits = lm(input_ids=row, use_cache=False).logits.float()[0]
        places = torch.from_numpy(targets).nonzero()[:, 0]
        total += torch.nn.functional.cross_entropy(logits[places - 1], row[0, places], reduction="sum").item()
        count += len(places)
    return total / count


ROUTED = {
    "opt": {},
    "falcon": {},
    "bloom": {},
    "gemma2": {},
    "llama4_text": {},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
    "llama": {
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
}


NOTED = {
    "opt": ["a row of its own"], "falcon": ["a row of its own"], "bloom": ["eager attention", "a row of its own"],
    "gemma2": ["eager attention"],
    "llama4_text": [], "bamba": ["a row of its own"], "llama": ["rotary factors", "above 24 tokens"],
}  # fmt: skip
"""Parts of what is said of each."""


@pytest.mark.parametrize("kind", ROUTED)
def test_the_loss_of_a_routed_model_is_that_of_its_rows_alone(kind, place, monkeypatch):
    from launcher.workers.worker_set import _inline_groups
    from training.config import SFT
    from training.recipes import RECIPES

    monkeypatch.setenv("MUSTER_CACHE", str(place / "cache"))
    config = config_of(kind, **ROUTED[kind])
    config.vocab_size = 260
    rows = [{"prompt": f"{n} + {n} =", "completion": " " + "so " * (n % 7) + str(2 * n)} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = model_in(place / "own", config, place / "model")
    data = {"train": str(place / "rows.jsonl"), "template": "none", "max_length": 64}
    phase = SFT(
        recipe="sft", model={"path": str(folder), "dtype": "fp32"}, data=data, max_steps=1, batch=12,
        sharding={"stage": 0},
        resources={"gpus_per_worker": 0},
    )  # fmt: skip
    group = _inline_groups(phase, RECIPES["sft"].roles, (phase, "cache"))["trainer"]
    info = group.call("setup")[0].result()
    got = group.call("train", 0, 1)[0].result()["rows"][0]["loss"]
    assert got == pytest.approx(alone(folder, rows, phase), rel=1e-5)
    assert all(part in " ".join(info.notes) for part in NOTED[kind])
