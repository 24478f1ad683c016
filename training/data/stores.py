"""The token stores of a phase: prepared on first use, found again by content afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.config import Phase, Source
from training.data import files
from training.data.prepare import prepare
from training.data.store import TokenStore
from training.errors import InputError, Problem
from training.modelfiles import tokenizer_of, window_of
from training.recipes import RECIPES
from training.vocabulary import check_tokens, embedding_rows


@dataclass(frozen=True)
class Stores:
    """What a phase trains on, and what it is evaluated on."""

    train: TokenStore
    eval: TokenStore | None
    weights: list[float] | None
    """Of the sources of `train`; None if every row comes once an epoch."""


def open_stores(phase: Phase, cache: Path) -> Stores:
    """Raises InputError for rows that cannot be used, in training or evaluation data, or that leave no room for a response."""
    stores: list[TokenStore | None] = []
    problems: list[Problem] = []
    for source in (phase.data.train, phase.data.eval):
        try:
            stores.append(_open(phase, source, cache) if source is not None else None)
        except InputError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise InputError(problems)
    train, held_out = stores
    assert train is not None, "a phase has data to train on"
    check_window(phase, train, window_of(phase.model.path))
    check_tokens(phase, stores, embedding_rows(phase.model.path))
    return Stores(train, held_out, _weights(phase.data.train))


def check_window(phase: Phase, train: TokenStore, window: int | None) -> None:
    """Raises InputError if the longest sample, and what the model writes behind it, are more than it was made for."""
    longest = min(train.meta.longest, phase.data.max_length) + phase.new_tokens
    if phase.new_tokens and window is not None and longest > window:
        message = (
            f"the longest prompt and a response of {phase.new_tokens} tokens come to {longest:,}, the model was made for "
            f"{window:,} positions; choose a smaller response_tokens, or data.max_length to drop long prompts"
        )
        raise InputError.of("", message, "response_tokens")


def _open(phase: Phase, source: str | list[str | Source], cache: Path) -> TokenStore:
    return prepare(
        files.expand(source, Path.cwd(), documents=RECIPES[phase.recipe].reads_documents),
        phase.data,
        RECIPES[phase.recipe].formats,
        tokenizer_of(phase.model),
        cache,
        trust_remote_code=phase.model.trust_remote_code,
    )


def _weights(source: str | list[str | Source]) -> list[float] | None:
    entries = [entry.weight for entry in source if isinstance(entry, Source)] if isinstance(source, list) else []
    weights = [weight for weight in entries if weight is not None]
    return weights or None
