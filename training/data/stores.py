"""The token stores of a phase: prepared on first use, found again by content afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.config import Phase, Source
from training.data import files
from training.data.prepare import prepare
from training.data.store import TokenStore
from training.recipes import RECIPES


@dataclass(frozen=True)
class Stores:
    """What a phase trains on, and what it is evaluated on."""

    train: TokenStore
    eval: TokenStore | None
    weights: list[float] | None
    """Of the sources of `train`; None if every row comes once an epoch."""


def open_stores(phase: Phase, cache: Path) -> Stores:
    """Raises InputError for rows that cannot be used, in training or evaluation data."""
    train = _open(phase, phase.data.train, cache)
    held_out = _open(phase, phase.data.eval, cache) if phase.data.eval is not None else None
    return Stores(train, held_out, _weights(phase.data.train))


def _open(phase: Phase, source: str | list[str | Source], cache: Path) -> TokenStore:
    tokenizer = phase.model.tokenizer or phase.model.path
    return prepare(
        files.expand(source, Path.cwd()),
        phase.data,
        RECIPES[phase.recipe].formats,
        tokenizer,
        cache,
        trust_remote_code=phase.model.trust_remote_code,
    )


def _weights(source: str | list[str | Source]) -> list[float] | None:
    entries = [entry.weight for entry in source if isinstance(entry, Source)] if isinstance(source, list) else []
    weights = [weight for weight in entries if weight is not None]
    return weights or None
