"""The embedding of a loaded model grows for tokens that were added to its tokenizer.

New rows begin as the mean of the others, of the embedding and of the head alike: the first probabilities of the old
tokens stay nearly what they were (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), and no random number is
needed, so all workers begin with the same rows.
"""

from __future__ import annotations

from typing import Any

import torch

from training.data.vocabulary import rows_in, rows_of
from training.engine.engine import whole
from training.errors import InputError


def grow(lm: Any, rows: int) -> bool:
    """Give the embedding and the head so many rows, if they have fewer; whether they had.
    ZeRO-3 may have sharded the model."""
    before = rows_in(lm)
    if rows <= before:
        return False
    try:
        lm.resize_token_embeddings(rows, mean_resizing=False)
    except (TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise InputError.of("", f"the embedding of {type(lm).__name__} cannot be resized: {error}", "model") from error
    head = lm.get_output_embeddings()
    for parameter in [*lm.get_input_embeddings().parameters(), *(head.parameters() if head is not None else ())]:
        if rows_of(parameter) != rows:
            name = type(lm).__name__
            raise InputError.of(
                "", f"the embedding of {name} cannot be resized: its head keeps {before:,} rows", "model"
            )
        _fill_with_mean(parameter, before)
    return True


def _fill_with_mean(parameter: Any, before: int) -> None:
    with torch.no_grad(), whole(parameter):
        if parameter.numel():  # not on a worker that holds none of it
            values = parameter.data
            values[before:] = values[:before].mean(0, dtype=torch.float32).to(values.dtype)
