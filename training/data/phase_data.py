"""The token stores of a phase: prepared on first use, found again by content afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.config import Data, Phase, Source
from training.data import files, question_prompts, reward_prompts, reward_signature
from training.data.files import Located
from training.data.prepare import prepare
from training.data.token_store import TokenStore
from training.data.vocabulary import check_tokens, embedding_rows
from training.errors import InputError, Problem
from training.model_folder import tokenizer_of, tokenizer_revision, window_of
from training.recipes import RECIPES


@dataclass(frozen=True)
class Stores:
    """What a phase trains on, and what it is evaluated on."""

    train: TokenStore
    eval: TokenStore | None
    weights: list[float] | None
    """Of the sources of `train`; None if every row comes once an epoch."""

    @property
    def damage(self) -> list[str]:
        """What was wrong with tokenized data that have just been made anew."""
        return [found for store in (self.train, self.eval) if store is not None for found in store.damage]


def open_stores(phase: Phase, cache: Path, *, verify: bool = True) -> Stores:
    """Raises InputError for rows that cannot be used, in training or evaluation data, or that leave no room for a
    response. `verify`: see `prepare`."""
    stores: list[TokenStore | None] = []
    problems: list[Problem] = []
    for held_out, source in ((False, phase.data.train), (True, phase.data.eval)):
        try:
            stores.append(_open(phase, held_out, cache, verify) if source is not None else None)
        except InputError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise InputError(problems)
    train, evaluated = stores
    assert train is not None, "a phase has data to train on"
    check_window(phase, train, window_of(phase.model.path))
    check_tokens(phase, stores, embedding_rows(phase.model.path))
    return Stores(train, evaluated, _weights(phase.data.train))


def prepare_phase(phase: Phase, cache: Path) -> tuple[Stores, list[str]]:
    """The stores of a phase, and what is to be said of its questions and rewards. Raises as `open_stores`, and for
    reward functions that cannot be called with the rows, or reward models that cannot be given them."""
    stores = open_stores(phase, cache)
    notes = question_prompts.check(phase, stores.train, cache)
    return stores, notes + reward_signature.check(phase, stores.train) + reward_prompts.check(
        phase, stores.train, cache
    )


def check_window(phase: Phase, train: TokenStore, window: int | None) -> None:
    """Raises InputError if the longest sample, and what the model writes behind it, are more than it was made for."""
    longest = min(train.meta.longest, phase.data.max_length) + phase.new_tokens
    if phase.new_tokens and window is not None and longest > window:
        message = (
            f"the longest prompt and a response of {phase.new_tokens} tokens come to {longest:,}, the model was made "
            f"for {window:,} positions; choose a smaller response_tokens, or data.max_length to drop long prompts"
        )
        raise InputError.of("", message, "response_tokens")


def sources_of(phase: Phase, *, held_out: bool) -> list[Located]:
    """Where the rows that a phase trains on, or is evaluated on, are. Raises InputError."""
    data = phase.data.eval if held_out else phase.data.train
    documents = RECIPES[phase.recipe].reads_documents
    split = "" if held_out else "train"
    return files.expand(data, Path.cwd(), documents=documents, split=split) if data is not None else []


def data_of(phase: Phase, *, held_out: bool) -> Data:
    """How these rows are read: bad ones are dropped from training data alone."""
    return phase.data.model_copy(update={"bad_rows": "refuse"}) if held_out else phase.data


def _open(phase: Phase, held_out: bool, cache: Path, verify: bool) -> TokenStore:
    return prepare(
        sources_of(phase, held_out=held_out),
        data_of(phase, held_out=held_out),
        RECIPES[phase.recipe].formats,
        tokenizer_of(phase.model),
        cache,
        trust_remote_code=phase.model.trust_remote_code,
        revision=tokenizer_revision(phase.model),
        verify=verify,
    )


def _weights(source: str | list[str | Source]) -> list[float] | None:
    entries = [entry.weight for entry in source if isinstance(entry, Source)] if isinstance(source, list) else []
    weights = [weight for weight in entries if weight is not None]
    return weights or None
