"""Rows of samples -> the tensors of one micro-batch.

Shapes: R rows, L places in a row, N targets. There is no attention mask: padding stands behind the samples of its row,
where causal attention never looks, and samples that share a row are told apart by position ids that start again at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""Target id that adds nothing to the loss (the `ignore_index` of torch's cross entropy)."""

Sample = tuple[NDArray[Any], NDArray[Any]]
"""Token ids [T] and the mask of those that are targets [T]."""


def collate(rows: Sequence[Sequence[Sample]]) -> dict[str, Tensor | None]:
    """The micro-batch as the model reads it.

    input_ids [R, L]; position_ids [R, L], or None if every row holds one sample; target_index [N], the places (in the
    flattened rows) whose *next* token is a target; target_ids [N], those tokens.
    Without rows: one row that teaches nothing.
    """
    if not rows:
        return {
            "input_ids": torch.zeros(1, 2, dtype=torch.long),
            "position_ids": None,
            "target_index": torch.zeros(1, dtype=torch.long),
            "target_ids": torch.full((1,), IGNORED, dtype=torch.long),
        }
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    target_index, target_ids = [], []
    for number, row in enumerate(rows):
        end = 0
        for ids, is_target in row:
            start, end = end, end + len(ids)
            input_ids[number, start:end] = ids
            positions[number, start:end] = np.arange(len(ids))
            targets = np.flatnonzero(is_target)
            target_index.append(number * length + start + targets - 1)
            target_ids.append(ids[targets].astype(np.int64))
        positions[number, end:] = np.arange(length - end)
    packed = any(len(row) > 1 for row in rows)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(positions) if packed else None,
        "target_index": torch.from_numpy(np.concatenate(target_index)),
        "target_ids": torch.from_numpy(np.concatenate(target_ids)),
    }


def to_device(batch: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Tensor | None]:
    """The same micro-batch on the device."""
    return {name: None if t is None else t.to(device, non_blocking=True) for name, t in batch.items()}
