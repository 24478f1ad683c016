"""Tiny random models of every causal architecture of transformers,
with a tokenizer of characters and rows to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from training.models.shrink import VOCABULARY, shrunk, small_model

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "".join(map(chr, range(ord("!"), ord("~"))))
"""Without the space: tokenizers treat it in ways of their own."""
MOST_PARAMETERS = 5_000_000


_NEEDED: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}
"""What published models of a type say, and the defaults of transformers do not."""


class CannotBuild(Exception):
    """There is no tiny model of this type. Says why."""


def types() -> list[str]:
    """All model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make(model_type: str, folder: Path) -> None:
    """Write the model, random and with weights large enough to matter, and its tokenizer. Raises CannotBuild."""
    try:
        lm = _small(_config_of(model_type))
        lm.save_pretrained(folder)
    except Exception as error:  # the code of a model raises what it likes
        raise error if isinstance(error, CannotBuild) else CannotBuild(f"{type(error).__name__}: {error}") from error
    _write_tokenizer(folder)


def _config_of(model_type: str) -> Any:
    """The configuration of a small copy of what the type's own defaults give; with the tokenizer's special tokens."""
    from transformers import AutoConfig

    usual: Any = AutoConfig.for_model(model_type, **_NEEDED.get(model_type, {}))
    if getattr(usual, "is_encoder_decoder", False) or _is_encoder(usual):
        raise CannotBuild("an encoder, or the decoder of an encoder: no causal language model by itself")
    config: Any = shrunk(usual)
    for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        if hasattr(config, name):
            setattr(config, name, token)
    config.use_cache = True
    if (rows := config.get_text_config().vocab_size) < VOCABULARY:
        raise CannotBuild(f"its vocabulary of {rows} tokens is not the tokenizer's")
    return config


def _is_encoder(config: Any) -> bool:
    return getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")


def _small(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        parameters = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise CannotBuild(f"the small copy still has {parameters:,} parameters")
    lm = small_model(config, AutoModelForCausalLM, "eager")
    lm.config.architectures = [type(lm).__name__]
    return lm


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, as far as there is room for bytes, and three special ones. Nothing is added to a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(CHARACTERS))
    tokens = [*SPECIAL, *CHARACTERS, *others][:VOCABULARY]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def text(length: int, rng: random.Random) -> str:
    """So many tokens."""
    return "".join(rng.choice(CHARACTERS) for _ in range(length))
