"""Checks, before anything runs, that the prompts of PPO can be put to its reward models, and that the critic reads the
policy's tokens. Results are cached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Model, Phase
from training.data.formats import Parser, Prompt
from training.data.prepare import tokenizer_content
from training.data.render import Sample, load_tokenizer, same_tokens, tokenizer_for
from training.data.row_errors import RowError
from training.data.token_store import TokenStore
from training.errors import InputError, Problem
from training.io.disk_cache import load_or_compute
from training.model_folder import has_tokenizer, recorded_info, tokenizer_of, window_of

_SHOWN = 5
"""Prompts that are refused, of each reward model."""
_AT_ONCE = 512
RESPONSE = "Yes"
"""What the prompts are rendered with."""


def check(phase: Phase, prompts: TokenStore, cache: Path) -> list[str]:
    """Notes on how reward models are given the prompts.

    Raises InputError with prompts that their templates refuse, with those that are too long for them, and for a critic
    that would start from a model of another tokenizer. Models that are not in a folder here are not looked at.
    """
    notes: list[str] = []
    problems = _critic_problems(phase, cache)
    for path in (source.path for source in phase.rewards if source.is_model and _is_folder(source.path)):
        result = _findings(path, phase, prompts, cache)
        notes += [f"the reward model {path}: {note}" for note in result["notes"]]
        problems += [
            Problem(where, "", f"the reward model {path} cannot be given this prompt: {why}")
            for where, why in result["refused"]
        ]
        if too_long := _too_long(path, result["longest"], phase):
            if _same_tokens(path, phase, cache):
                problems.append(Problem("", "response_tokens", too_long))
            else:  # its tokens of a response are more or fewer than the policy's
                notes.append(too_long)
    if problems:
        raise InputError(problems)
    return notes


def _is_folder(path: str) -> bool:
    """Whether a model is in a folder here; a name without a slash is that of a phase of the job."""
    return "/" in path and os.path.isdir(path)


def _too_long(path: str, longest: int, phase: Phase) -> str:
    window, longest = window_of(path), longest + phase.new_tokens
    if window is None or longest <= window:
        return ""
    return (
        f"the reward model {path} was made for {window:,} positions; the longest prompt and a response of "
        f"{phase.new_tokens:,} tokens come to about {longest:,}"
    )


def _critic_problems(phase: Phase, cache: Path) -> list[Problem]:
    """The critic starts from the model that it names, else from the first reward model."""
    start = phase.critic_start
    if start is None or not _is_folder(start) or _same_tokens(start, phase, cache):
        return []
    what = start if "critic" in phase.named_models else f"the reward model {start}"
    message = (
        f"the critic starts from {what}, whose tokenizer is not the policy's: it would read the policy's tokens as "
        "others; set critic to a model that has the policy's tokenizer"
    )
    return [Problem("", "critic", message)]


def _same_tokens(path: str, phase: Phase, cache: Path) -> bool:
    """Whether a model reads the policy's tokens as the policy does. One without a tokenizer of its own is taken to."""
    own, policy = tokenizer_of(Model(path=path)), tokenizer_of(phase.model)
    if not has_tokenizer(Path(own)) or not os.path.isdir(policy):
        return True
    contents = [tokenizer_content(own), tokenizer_content(policy)]
    if contents[0] == contents[1]:
        return True
    trust = phase.model.trust_remote_code
    same: bool = load_or_compute(
        cache, "same_tokens", contents, lambda: same_tokens(load_tokenizer(own, trust), tokenizer_for(phase.model))
    )
    return same


def _findings(path: str, phase: Phase, prompts: TokenStore, cache: Path) -> dict[str, Any]:
    """`notes`, `refused` prompts with the reasons, and the tokens of the `longest`."""
    key = [
        prompts.folder.name,
        phase.data.columns,
        tokenizer_content(tokenizer_of(Model(path=path))),
        recorded_info(path),
    ]
    result: dict[str, Any] = load_or_compute(cache, "reward_prompts", key, lambda: _inspect(path, phase, prompts))
    return result


def _inspect(path: str, phase: Phase, prompts: TokenStore) -> dict[str, Any]:
    from training.data.model_renderer import renderer_for

    renderer, parse = (
        renderer_for(path, trust_remote_code=phase.model.trust_remote_code),
        Parser("prompts", phase.data.columns, ("prompts",)),
    )
    refused: list[tuple[str, str]] = []
    longest = 0
    for start in range(0, len(prompts), _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, len(prompts)))
        examples = [_prompt(parse, prompts.row(number)) for number in numbers]
        rendered = renderer.judged(examples, [RESPONSE] * len(examples), [True] * len(examples))
        refused += [
            (prompts.where(number), str(each))
            for number, each in zip(numbers, rendered, strict=True)
            if isinstance(each, RowError)
        ]
        longest = max([longest, *(len(each.ids) for each in rendered if isinstance(each, Sample))])
        if len(refused) >= _SHOWN:
            break
    return {"notes": conversation_notes(renderer.notes), "refused": refused[:_SHOWN], "longest": longest}


def _prompt(parse: Parser, row: dict[str, Any]) -> Prompt:
    _, example = parse(row)
    assert isinstance(example, Prompt), "PPO reads prompts"
    return example


def conversation_notes(notes: Sequence[str]) -> list[str]:
    """Those of a renderer's notes that concern how conversations are written."""
    return [note for note in notes if note.startswith(("the chat template", "the tokenizer has no chat template"))]
