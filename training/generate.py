"""Continues prompts with a model: what `muster generate` shows. Knows no runs."""

from __future__ import annotations

from collections.abc import Sequence

from training.evaluate import end_tokens
from training.evaluator import Speaker
from training.sampling import Sampling, continue_all
from training.seeding import seed_for


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
    model = Speaker(path, "chat" if chat else "plain")
    ids = [model.renderer.prompt(prompt, chat=chat) for prompt in prompts]
    keys = [seed_for(seed, "sample", 0, number, 0) for number in range(len(prompts))]
    ends = end_tokens(model.tokenizer, model.lm.generation_config)
    settings = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    return [model.renderer.text(one.tokens) for one in continue_all(model.lm, ids, keys, ends, settings)]
