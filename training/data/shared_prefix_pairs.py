"""Pairs as trees: the common prefix of the two sequences of a pair is stored in their row, and computed, once.

Two answers to one question share the question. Where attention takes a mask, both can look back at one copy of it, and
no number changes: what stands before a token is the same, and so is its position. (Prefix sharing, arXiv:2410.20305,
with a dense mask; decision 20.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Token ids of the chosen and of the rejected sequence."""

_BRANCHES = 3
"""Of a pair: what both begin with, the rest of the chosen sequence, the rest of the rejected one."""
_PADDING = -1


def trees(rows: Sequence[Sequence[Pair]]) -> dict[str, Tensor | None]:
    """The micro-batch for P pairs in R rows of L places, at least one pair.

    input_ids, position_ids and branches [R, L]; last_index [2 P]: places, in the flattened rows, of the last tokens of
    chosen, rejected, chosen, ... `branches` tells apart, for `mask_of`, the pairs of a row and the parts of a pair.
    """
    parts = [[_parts(*pair) for pair in row] for row in rows]
    length = max(sum(map(len, _flat(row))) for row in parts)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    branches = np.full((len(rows), length), _PADDING, dtype=np.int64)
    last = []
    for number, row in enumerate(parts):
        end = 0
        for branch, part in enumerate(_flat(row)):
            before = 0 if branch % _BRANCHES == 0 else len(row[branch // _BRANCHES][0])
            start, end = end, end + len(part)
            ids[number, start:end] = part
            positions[number, start:end] = np.arange(before, before + len(part))
            branches[number, start:end] = branch
            if branch % _BRANCHES:
                last.append(number * length + end - 1)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "branches": torch.from_numpy(branches),
        "last_index": torch.tensor(last),
    }


def mask_of(branches: Tensor) -> Tensor:
    """What may look where: at what stands before it in its own branch and in the trunk of its pair.
    [R, L] -> [R, 1, L, L] bool"""
    query, key = branches[:, :, None], branches[:, None, :]
    same_pair = query // _BRANCHES == key // _BRANCHES
    return (same_pair & ((key % _BRANCHES == 0) | (key == query))).tril()[:, None]


def _parts(chosen: NDArray[Any], rejected: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What both begin with, and the rest of each, which is not empty."""
    most = min(len(chosen), len(rejected)) - 1
    differ = np.flatnonzero(chosen[:most] != rejected[:most])
    shared = int(differ[0]) if len(differ) else most
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _flat(row: Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]) -> list[NDArray[Any]]:
    return [part for pair in row for part in pair]
