"""Tiny random models of every causal architecture of transformers, with a tokenizer of characters and rows to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "".join(chr(code) for code in range(33, 126))
"""Without the space, so that text and tokens are one to one."""
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
WINDOW = 16
"""Of sliding attention: shorter than most samples."""
MOST_PARAMETERS = 5_000_000
_SEED = 17

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32,
    "embed_dim": 32, "dim": 32, "word_embed_proj_dim": 32, "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48, "n_inner": 48, "dim_ff": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "dim_head": 8, "rotary_dim": 8, "max_position_embeddings": 256,
    "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 16,
    "mamba_n_groups": 1, "mamba_d_ssm": 64, "state_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": EOS,
}  # fmt: skip


class CannotBuild(Exception):
    """There is no tiny model of this type. Says why."""


def types() -> list[str]:
    """All model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(model_type: str) -> Any:
    """The configuration of a tiny model of this type."""
    from transformers import AutoConfig

    kind = type(AutoConfig.for_model(model_type))
    known = kind()
    keys = {**_SIZES, **_special_sizes(model_type, known)}
    return kind(**{key: value for key, value in keys.items() if _has(known, key)})


def _has(config: Any, key: str) -> bool:
    return key in config.to_dict() or (
        hasattr(config, key) and not isinstance(getattr(type(config), key, None), property)
    )


def _special_sizes(model_type: str, known: Any) -> dict[str, Any]:
    """Where one size for all does not do."""
    sizes: dict[str, Any] = {}
    if getattr(known, "is_decoder", None) is False:
        sizes["is_decoder"] = True
    if getattr(known, "sliding_window", None) is not None:
        sizes["sliding_window"] = WINDOW
    for key in ("layer_types", "layers_block_type"):
        if isinstance(known.to_dict().get(key), list):
            kinds = list(dict.fromkeys(getattr(known, key)))
            sizes |= {key: kinds if len(kinds) > 1 else 2 * kinds, "num_hidden_layers": max(2, len(kinds))}
    return sizes | _OF_TYPE.get(model_type, {})


_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_oss": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16), "attention_head_size": 8},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "zaya": {"num_experts_per_tok": 1},
}
"""Where the sizes of all types do not do."""


def make(model_type: str, folder: Path) -> None:
    """Write the model, random and with weights large enough to matter, and its tokenizer. Raises CannotBuild."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        config = config_of(model_type)
        with torch.device("meta"):
            number = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if number > MOST_PARAMETERS:
            raise CannotBuild(f"the smallest that the settings give has {number:,} parameters")
        torch.manual_seed(_SEED)
        lm: Any = AutoModelForCausalLM.from_config(config)
    except CannotBuild:
        raise
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    _enlarge(lm)
    lm.config.architectures = [type(lm).__name__]
    try:
        lm.save_pretrained(folder)
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    _write_tokenizer(folder)


def _enlarge(lm: Any) -> None:
    """Weights as transformers begins them are so small that hardly any mistake would show in a loss."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() >= 2 and bool(parameter.any()):
                parameter.mul_(3.0)
            elif "sink" in name:
                parameter.fill_(2.0)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _write_tokenizer(folder: Path) -> None:
    """One token a character, and three special ones. Nothing is added to a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def text(length: int, rng: random.Random) -> str:
    """So many tokens."""
    return "".join(rng.choice(CHARACTERS) for _ in range(length))


def tokens(of: str) -> list[int]:
    """What the tokenizer makes of a text."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in of]


def decoded(ids: list[int]) -> str:
    """What the tokenizer makes of tokens, without special ones."""
    return "".join(CHARACTERS[each - len(SPECIAL)] for each in ids if each >= len(SPECIAL))
