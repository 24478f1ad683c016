"""A made-up job for all sides of a comparison: rows of GSM8K's lengths, a tokenizer for them,
a small LLaMA. No download."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 4096

_CORRELATION = 0.5
"""Of the logarithms of the two lengths of a GSM8K row: long questions have long answers."""
_LEXICON = 3000
_TOKENIZER_ROWS = 1500


@dataclass(frozen=True)
class Length:
    """A log-normal number of words. Most words made here are one token."""

    log_mean: float
    log_std: float
    most: int

    def draw(self, deviation: float) -> int:
        return max(1, min(round(math.exp(self.log_mean + self.log_std * deviation)), self.most))


@dataclass(frozen=True)
class Lengths:
    """Of the rows of a workload."""

    prompt: Length
    completion: Length
    max_tokens: int
    """No row is longer."""


GSM8K = Lengths(Length(4.05, 0.38, 200), Length(4.50, 0.43, 300), 512)
"""As a tokenizer of 4,096 tokens that was trained on GSM8K cuts its training rows."""
SKEWED = Lengths(Length(3.60, 0.50, 120), Length(4.30, 1.10, 1700), 2048)
"""A heavy tail: as many tokens a row on average, half of the rows shorter than 130,
one in a hundred longer than 1,000."""


@dataclass(frozen=True)
class Shape:
    """Of a LLaMA."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = VOCABULARY
    """At least that of the tokenizer."""


SMALL = Shape(384, 1024, 7, 6)
"""15.5 million parameters."""
LARGE = Shape(768, 2048, 13, 12)
"""98.3 million parameters."""


@dataclass(frozen=True)
class Workload:
    """Model folder (with tokenizer) and rows of prompt and completion."""

    model: Path
    rows: Path
    max_tokens: int
    """No row is longer."""


def make(
    folder: Path,
    num_rows: int,
    seed: int = 17,
    shape: Shape = SMALL,
    lengths: Lengths = GSM8K,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Workload:
    """Write a workload into `folder`. Equal arguments, equal rows. `device`: where the weights are drawn,
    `dtype`: how they are kept."""
    folder.mkdir(exist_ok=True)
    work = Workload(folder / "model", folder / "rows.jsonl", lengths.max_tokens)
    made = list(rows(num_rows, seed, lengths))
    work.rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    tokenizer = _tokenizer([text for row in made[:_TOKENIZER_ROWS] for text in row.values()], work.max_tokens)
    tokenizer.save_pretrained(work.model)
    _model(tokenizer, seed, shape, work.max_tokens, device, dtype).save_pretrained(work.model)
    return work


def rows(count: int, seed: int, lengths: Lengths = GSM8K) -> Iterator[dict[str, str]]:
    """Prompt and completion of made-up words, the frequent ones frequent as in a language (Zipf)."""
    chance = random.Random(seed)
    lexicon = _lexicon(chance)
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    for _ in range(count):
        prompt, completion = _draw(lengths, chance)
        words = chance.choices(lexicon, weights, k=prompt + completion)
        # A token does not go across the line break, so that all sides cut a row alike.
        yield {"prompt": " ".join(words[:prompt]) + "\n", "completion": " ".join(words[prompt:])}


def make_pairs(folder: Path, num_rows: int, seed: int = 17, shape: Shape = SMALL) -> Workload:
    """The same with rows of prompt, chosen and rejected: two completions of a row's length each."""
    work = make(folder, num_rows, seed, shape)
    others = [row["completion"] for row in rows(num_rows, seed + 1)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
        for row, other in zip(rows(num_rows, seed), others, strict=True)
    ]
    work.rows.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    return work


def _draw(lengths: Lengths, chance: random.Random) -> tuple[int, int]:
    """Words of a prompt and of its completion."""
    shared = math.sqrt(_CORRELATION) * chance.gauss(0, 1)
    rest = math.sqrt(1 - _CORRELATION)
    prompt, completion = (shared + rest * chance.gauss(0, 1) for _ in range(2))
    return lengths.prompt.draw(prompt), lengths.completion.draw(completion)


def _lexicon(chance: random.Random) -> list[str]:
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on")]
    words = {"".join(chance.choices(syllables, k=chance.choice((1, 2, 2, 3)))) for _ in range(2 * _LEXICON)}
    return sorted(words, key=lambda word: (len(word), word))[:_LEXICON]


def _tokenizer(texts: list[str], max_tokens: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=max_tokens, **special)


def _model(tokenizer: Any, seed: int, shape: Shape, max_tokens: int, device: str, dtype: str) -> Any:
    """A LLaMA with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
