"""A tokenizer trained on sample text and a tiny LLaMA with random weights, saved as one Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from training.seeding import seed_for

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
"""Enough for every word of the sample data; the 256 bytes are among them, so that any text can be written."""

MAX_TOKENS = 256
"""Positions of the model; the longest sample with its critique has fewer."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else -%}
{{ message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}"""
"""A question and a line break, then the answer: what a row of sft.jsonl says without a template."""


def save_model(folder: Path, text: Iterable[str], seed: int) -> int:
    """Write tokenizer and model to `folder`. Returns the number of parameters. Equal text and seed, equal bytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # the files are written in an instant
    tokenizer = train_tokenizer(text)
    model = build_model(tokenizer, seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model.num_parameters()


def train_tokenizer(text: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own.
    Nothing is added, nothing normalised: decode(encode(x)) == x."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(special.values()),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **special,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A LLaMA of about a million parameters, small enough to learn the sample data on two CPU cores in minutes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.06,  # 0.02 suits wide layers; these narrow ones learn twice as fast from larger weights
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "tiny model"))
        model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=False, max_new_tokens=64)
    return model
