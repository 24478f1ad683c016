"""Tokens/s of Muster's generation against transformers' `generate` with left padding: same model,
prompts, lengths, process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.options import Options
from benchmarks.record import ratios, spread

PROMPTS = 64
BATCH = 32
NEW_TOKENS = 64
TARGET = 1.0
SEVERAL = 8
"""Responses to each prompt, where there are several."""
_END_AFTER = 12
"""A token is an end of text as often as one in so many is drawn: responses end at different
places, as they do in earnest."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of both: responses that all have the full length, some that end early, several to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    work = workload.make(folder, PROMPTS)
    tokenizer: Any = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    lm: Any = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).eval()
    texts = [row["prompt"] for row in workload.rows(PROMPTS, 17)]
    few = [text for text in texts[: PROMPTS // SEVERAL] for _ in range(SEVERAL)]
    ending = list(range(0, workload.VOCABULARY, _END_AFTER))
    sides: dict[str, tuple[list[str], list[int]]] = {
        "full": (texts, []),
        "ending": (texts, ending),
        "several": (few, ending),
    }
    figures: dict[str, Any] = {"prompts": PROMPTS, "batch": BATCH, "new_tokens": NEW_TOKENS, "target": TARGET}
    for name, (asked, ends) in sides.items():
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(options.rounds):
            ours.append(_rate(partial(_muster, lm, tokenizer, asked, ends)))
            theirs.append(_rate(partial(_transformers, lm, tokenizer, asked, ends)))
        figures[name] = {
            "ratio": ratios(ours, theirs),
            "muster_tokens_per_s": spread(ours, 1),
            "transformers_tokens_per_s": spread(theirs, 1),
        }
    return figures


def _rate(generate: Callable[[], int]) -> float:
    began = time.perf_counter()
    return generate() / (time.perf_counter() - began)


def _muster(lm: Any, tokenizer: Any, texts: Sequence[str], ends: Sequence[int]) -> int:
    """Tokens generated, those that end a text included."""
    from training.generation.sampling import Sampling, generate_all

    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    settings = Sampling(max_new_tokens=NEW_TOKENS)
    out = generate_all(lm, prompts, range(len(prompts)), ends, settings, batch=BATCH)
    return sum(len(one.tokens) + one.ended for one in out)


def _transformers(lm: Any, tokenizer: Any, texts: Sequence[str], ends: Sequence[int]) -> int:
    import torch

    count = 0
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = lm.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=list(ends) or None,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = out[:, batch["input_ids"].shape[1] :]
        for row in new.tolist():
            ended = [place for place, token in enumerate(row) if token in set(ends)]
            count += ended[0] + 1 if ended else len(row)
    return count
