"""Whether the prompts of PPO can be given to its reward models, and how: found out before anything runs, once for the same prompts and model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import PPO
from training.data.files import RowError
from training.data.formats import Parser, Prompt
from training.data.prepare import tokenizer_content
from training.data.render import Sample
from training.data.store import TokenStore
from training.errors import InputError, Problem
from training.modelfiles import facts_in, window_of

_SHOWN = 5
"""Prompts that are refused, of each reward model."""
_AT_ONCE = 512
_RESPONSE = "Yes"
"""What the prompts are rendered with."""


def check(phase: PPO, prompts: TokenStore, cache: Path) -> list[str]:
    """What the user should know of how reward models are given the prompts. Raises InputError with prompts that their templates refuse.

    Models that are not in a folder here are not looked at.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    for path in (source.path for source in phase.rewards if source.is_model and os.path.isdir(source.path)):
        found = _known(path, phase, prompts, cache)
        notes += [f"the reward model {path}: {note}" for note in found["notes"]]
        problems += [
            Problem(where, "", f"the reward model {path} cannot be given this prompt: {why}")
            for where, why in found["refused"]
        ]
        window, longest = window_of(path), found["longest"] + phase.response_tokens
        if window is not None and longest > window:
            notes.append(
                f"the reward model {path} was made for {window:,} positions; the longest prompt and a response of "
                f"{phase.response_tokens:,} tokens come to about {longest:,}"
            )
    if problems:
        raise InputError(problems)
    return notes


def _known(path: str, phase: PPO, prompts: TokenStore, cache: Path) -> dict[str, Any]:
    """What is found of a reward model, from a file in the cache if it is there."""
    asked = [prompts.folder.name, phase.data.columns, tokenizer_content(path), facts_in(path)]
    file = (
        cache / "reward_prompts" / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]}.json"
    )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = _found(path, phase, prompts)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}-{os.getpid()}")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(file)
    except OSError:
        pass  # a cache that cannot be written: it is found out again
    return found


def _found(path: str, phase: PPO, prompts: TokenStore) -> dict[str, Any]:
    from training.data.model_renderer import renderer_for

    renderer, parse = renderer_for(path), Parser("prompts", phase.data.columns, ("prompts",))
    refused: list[tuple[str, str]] = []
    longest = 0
    for start in range(0, len(prompts), _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, len(prompts)))
        asked = [_prompt(parse, prompts.row(number)) for number in numbers]
        rendered = renderer.judged(asked, [_RESPONSE] * len(asked), [True] * len(asked))
        refused += [
            (prompts.where(number), str(each))
            for number, each in zip(numbers, rendered, strict=True)
            if isinstance(each, RowError)
        ]
        longest = max([longest, *(len(each.ids) for each in rendered if isinstance(each, Sample))])
        if len(refused) >= _SHOWN:
            break
    return {"notes": _notes(renderer.notes), "refused": refused[:_SHOWN], "longest": longest}


def _prompt(parse: Parser, row: dict[str, Any]) -> Prompt:
    _, example = parse(row)
    assert isinstance(example, Prompt), "PPO reads prompts"
    return example


def _notes(notes: Sequence[str]) -> list[str]:
    """Those of the renderer that say how conversations are written; how texts are is the reward model's own training."""
    return [note for note in notes if note.startswith(("the chat template", "the tokenizer has no chat template"))]
