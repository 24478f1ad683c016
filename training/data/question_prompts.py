"""Checks, before anything runs, that the questions of a phase's evaluation can be put
to its model. Results are cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Phase
from training.data import files, questions
from training.data.questions import Question
from training.data.render import Renderer, Sample, tokenizer_for
from training.data.row_errors import RowError
from training.data.token_store import TokenStore
from training.errors import InputError, Problem
from training.io.disk_cache import load_or_compute
from training.model_folder import window_of


def check(phase: Phase, train: TokenStore, cache: Path) -> list[str]:
    """Notes on parts of the questions that the model does not see. Raises InputError with those
    that the chat template refuses, or that are too long.

    `train`: what the phase trains on, whose tokenizer and template are those of the questions.
    """
    if phase.eval is None:
        return []
    paths = [path for path in (phase.eval.data, phase.eval.verdicts) if path is not None]
    contents = [files.digest(part, cache / "digests") for path in paths for part in questions.find_source(path).parts]
    key = [train.folder.name, contents, phase.eval.model_dump(mode="json"), window_of(phase.model.path)]
    result: dict[str, Any] = load_or_compute(cache, "question_prompts", key, lambda: _inspect(phase, train))
    if result["refused"]:
        raise InputError([Problem(where, "", why) for where, why in result["refused"]])
    return [f"evaluation: {note}" for note in result["notes"]]


def _inspect(phase: Phase, train: TokenStore) -> dict[str, Any]:
    """`notes`, and the questions that are `refused` with the reasons."""
    renderer = Renderer(tokenizer_for(phase.model), phase.data.template, bos=phase.data.bos, in_turns=train.meta.chats)
    rows = _questions(phase)
    window = window_of(phase.model.path)
    rendered = renderer.render([question.prompt for question in rows])
    reasons = [(question.where, _why_not(each, window)) for question, each in zip(rows, rendered, strict=True)]
    refused = [(where, why) for where, why in reasons if why]
    longest = max((len(each.ids) for each in rendered if isinstance(each, Sample)), default=0)
    assert phase.eval is not None
    room = room_note(longest, window, phase.eval.max_new_tokens)
    return {"notes": [*unseen_notes(renderer.notes), *room], "refused": refused[: questions.SHOWN_PROBLEMS]}


def _questions(phase: Phase) -> list[Question]:
    assert phase.eval is not None
    rows = questions.read(phase.eval.data, phase.eval.columns, phase.eval.limit)
    return rows + (questions.read_verdicts(phase.eval.verdicts, phase.eval.limit) if phase.eval.verdicts else [])


def _why_not(rendered: Sample | RowError, window: int | None) -> str:
    if isinstance(rendered, RowError):
        return str(rendered)
    if window is None or len(rendered.ids) < window:
        return ""
    return (
        f"the question has {len(rendered.ids):,} tokens, the model has {window:,} positions for it and the response; "
        "shorten it"
    )


def room_note(longest: int, window: int | None, max_new_tokens: int) -> list[str]:
    """A note that responses end before `max_new_tokens`, if they do: generation never goes beyond
    a model's positions."""
    if window is None or longest + max_new_tokens <= window:
        return []
    return [
        f"the longest question has {longest:,} tokens, which leaves {window - longest:,} of the model's {window:,} "
        f"positions to its response; max_new_tokens is {max_new_tokens:,}"
    ]


def unseen_notes(notes: Sequence[str]) -> list[str]:
    """Those of a renderer's notes that name parts of prompts which the model does not see."""
    return [note for note in notes if "does not write" in note or "is not read" in note]
