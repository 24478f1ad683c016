"""Continues prompts with a model: what `muster generate` shows. Knows no runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from training.data.render import load_tokenizer
from training.errors import InputError
from training.model import refuse_holes, resolve_dtype

_BATCH = 16


def generate(
    path: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[str]:
    """The model's continuation of each prompt, without the prompt, up to its end-of-text token.

    Temperature 0 is greedy. `chat` writes each prompt as a user's turn with the tokenizer's chat template.
    Raises InputError if the model cannot be loaded or has no chat template.
    """
    lm, tokenizer = _load(path)
    texts = [_as_chat(tokenizer, path, prompt) for prompt in prompts] if chat else list(prompts)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    answers: list[str] = []
    for start in range(0, len(texts), _BATCH):
        answers += _continue(lm, tokenizer, texts[start : start + _BATCH], max_new_tokens=max_new_tokens, **sampling)
    return answers


def _load(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = load_tokenizer(path)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so it may be any token
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError.of(path, f"cannot load the model: {error}") from error
    lm, info = loaded
    refuse_holes(path, info)
    if torch.cuda.is_available():
        lm.to("cuda", resolve_dtype("auto", "cuda"))
    return lm, tokenizer


@torch.inference_mode()
def _continue(lm: Any, tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    out = lm.generate(
        **batch.to(lm.device),
        **settings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _as_chat(tokenizer: Any, path: str, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise InputError.of(path, "the tokenizer has no chat template; leave --chat out")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
