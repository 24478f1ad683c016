"""Tokenizer and embedding: token ids that the embedding has no row for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import Model, Phase
from training.errors import InputError
from training.model_folder import adapter_in, base_of, rows_of_embedding

if TYPE_CHECKING:
    from training.data.token_store import TokenStore

_SHOWN = 4


def embedding_rows(path: str) -> int | None:
    """Rows of the embedding of the model in a folder, or of the one that an adapter brings.
    None: not known, as of a hub id."""
    adapter = adapter_in(path)
    if adapter is not None and adapter.embedding_rows is not None:
        return adapter.embedding_rows
    folder = Path(base_of(path))
    return rows_of_embedding(folder) if folder.is_dir() else None


def tokenizer_rows(model: Model) -> int:
    """Rows that an embedding needs for every token of the model's tokenizer."""
    return rows_for(_tokenizer(model))


def rows_for(tokenizer: Any) -> int:
    """The same of a loaded tokenizer."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def check_tokens(phase: Phase, stores: Iterable[TokenStore | None], rows: int | None) -> None:
    """Raises InputError if tokens of the data have no row in an embedding of so many rows
    (None: not known), which does not grow."""
    if rows is None or phase.model.resize_embedding == "auto":
        return
    beyond = sorted({number for store in stores if store is not None for number in store.ids_from(rows)})
    if beyond:
        named = f"model.tokenizer {phase.model.tokenizer}" if phase.model.tokenizer else "the tokenizer"
        raise InputError.of(
            "",
            f"the data have tokens of {named} that the embedding of {phase.model.path} has no row for: "
            f"{_named(phase.model, beyond)}; the embedding has {rows:,} rows, ids 0 to {rows - 1:,}. Set "
            "model.resize_embedding: auto to add and train rows for them, or set model.tokenizer to the tokenizer "
            "that the model was trained with",
            "model.tokenizer" if phase.model.tokenizer else "model.path",
        )


def notes(phase: Phase, needed: int) -> list[str]:
    """What a user should know of a tokenizer that needs more rows (0: not known) than the embedding has."""
    model, rows = phase.model, embedding_rows(phase.model.path)
    if rows is None or needed <= rows:
        return []
    some = _named(model, range(rows, needed))
    if model.resize_embedding == "auto":
        trained = "; embedding and head are trained whole beside the adapters" if model.lora is not None else ""
        return [
            (
                f"the embedding grows from {rows:,} to {needed:,} rows, for {some}: the new rows begin as the mean of "
                f"the others{trained}"
            )
        ]
    return [
        (
            f"the tokenizer has tokens that the embedding of {rows:,} rows has no row for: {some}; none of them occurs "
            "in the data"
        )
    ]


def beyond(ids: Iterable[int], rows: int | None, tokenizer: Any = None) -> str | None:
    """What is wrong with token ids that an embedding of so many rows has no row for, if there are any."""
    odd = sorted({int(number) for number in ids if rows is not None and number >= rows})
    if not odd:
        return None
    some = _listed(odd, tokenizer.convert_ids_to_tokens(odd[:_SHOWN]) if tokenizer is not None else None)
    return (
        f"the model's embedding has {rows:,} rows and none for {some}; use the tokenizer that the model was trained "
        "with, or train the model with model.resize_embedding: auto"
    )


def rows_in(lm: Any) -> int:
    """Rows of the embedding of a loaded model."""
    return rows_of(lm.get_input_embeddings().weight)


def rows_of(parameter: Any) -> int:
    """Rows of a parameter, also of one that ZeRO-3 has sharded."""
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def _tokenizer(model: Model) -> Any:
    from training.data.render import tokenizer_for

    return tokenizer_for(model)


def _named(model: Model, ids: Sequence[int]) -> str:
    return _listed(ids, _tokenizer(model).convert_ids_to_tokens(list(ids[:_SHOWN])))


def _listed(ids: Sequence[int], tokens: Sequence[str | None] | None) -> str:
    """The first of some ids with their tokens, and how many more there are."""
    named = [
        f"{token} ({number})" if token else str(number)
        for number, token in zip(ids, tokens or [""] * len(ids), strict=False)
    ]
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more
