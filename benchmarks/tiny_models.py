"""Tiny random models of every causal architecture of transformers, with a tokenizer of characters and rows to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from training.shrink import VOCABULARY, shrunk, small_model

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
_LATIN = [*range(ord("!"), ord("~")), *range(ord("\u00c0"), ord("\u00ff"))]
CHARACTERS = "".join(map(chr, _LATIN))[: VOCABULARY - len(SPECIAL)]
"""Without the space, so that text and tokens are one to one."""
MOST_PARAMETERS = 5_000_000


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

    config: Any = shrunk(AutoConfig.for_model(model_type))
    for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        if hasattr(config, name):
            setattr(config, name, token)
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    config.use_cache = True
    if (rows := config.get_text_config().vocab_size) < VOCABULARY:
        raise CannotBuild(f"its vocabulary of {rows} tokens is not the tokenizer's")
    return config


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
    """One token a character, and three special ones. Nothing is added to a text."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.decoder = decoders.Fuse()
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
