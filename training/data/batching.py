"""Partitions the samples of one global batch into shares of workers, rows and micro-batches. Uses lengths, never
contents.

Every worker computes the whole deal from the lengths, so nothing has to be agreed on over the network. The deal changes
how fast a batch is done and how much memory it takes; what the batch teaches does not depend on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from training.config import Phase

_MICRO_TOKENS = 4096
_MICRO_TOKENS_CPU = 1024
"""A CPU gains from large micro-batches only that gradients are sent less often,
and its memory is slow where it is not used again soon."""
_MICRO_TOKENS_CPU_SMALL = 512
"""For adapters, whose gradients are quickly sent, and for pairs, of which two that differ
in length cost each other more than the sending."""
_ROW_TOKENS_WITHOUT_VARLEN = 320
"""Without a kernel for packed rows, attention pays for the whole row: longer packs cost more than they save."""
_ROW_TOKENS_CPU = 512
"""Rows that packing makes at most; a longer sample has one for itself."""

SDPA_VARLEN = "sdpa_varlen"
"""Attention by torch's kernel, sample by sample (training/models/attention.py)."""

Row = list[int]
"""Samples that share a row, as places in the global batch."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """What one micro-batch may hold."""

    micro_tokens: int
    """Places in a micro-batch, padding included. A longer sample still goes in, alone."""
    micro_batch: int | None = None
    """Samples in a micro-batch; if given, micro_tokens is not looked at."""
    row_tokens: int | None = None
    """Length up to which samples are packed into one row. None: one sample in a row."""
    one_row: bool = False
    """A micro-batch is one row: kernels that tell packed samples apart by position take no more."""
    same_length_above: int | None = None
    """Rows that are longer than this share a micro-batch only with rows of the same length: models
    to which padding matters."""


def limits_for(
    phase: Phase, longest: int, device: str, attention: str, *, packs: bool = True, same_length_above: int | None = None
) -> BatchLimits:
    """What a micro-batch may hold, from the settings and, where they say auto, from the hardware.

    `packs`: whether the model keeps samples that share a row apart. `same_length_above`: as in Limits.
    """
    on_cpu = device == "cpu"
    if phase.micro_tokens != "auto":
        tokens = phase.micro_tokens
    elif on_cpu:
        small = phase.model.lora is not None or phase.sequences_per_sample > 1
        tokens = _MICRO_TOKENS_CPU_SMALL if small else _MICRO_TOKENS_CPU
    else:
        tokens = max(_MICRO_TOKENS, longest)
    packs, varlen = phase.data.pack and packs, is_varlen(attention)
    dense = max(_ROW_TOKENS_WITHOUT_VARLEN, min(longest, _ROW_TOKENS_CPU) if on_cpu else longest)
    row = tokens if varlen else min(tokens, dense)
    return BatchLimits(
        micro_tokens=tokens,
        micro_batch=phase.micro_batch,
        row_tokens=row if packs else None,
        one_row=varlen and packs,
        same_length_above=same_length_above,
    )


def is_varlen(attention: str) -> bool:
    """Whether an attention kernel pays for the samples of a packed row, not for the whole row."""
    return attention.startswith("flash_attention") or attention == SDPA_VARLEN


def partition_batch(lengths: Sequence[int], num_workers: int, limits: BatchLimits) -> list[list[list[Row]]]:
    """`partition_batch(...)[worker][micro-batch]` is a list of rows;
    every worker gets the same number of micro-batches.

    An empty list of rows is a turn that a worker has nothing for: it must still run one forward and backward pass,
    because the collectives of ZeRO-3 count on all workers.
    """
    micro_batches = [
        _micro_batches(_rows(share, lengths, limits), lengths, limits)
        for share in _even(range(len(lengths)), lengths, num_workers)
    ]
    num_micro_batches = max(map(len, micro_batches))
    return [_stretch(of_worker, num_micro_batches) for of_worker in micro_batches]


def _even(samples: Sequence[int], lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """`num_parts` parts with nearly the same number of tokens: the longest sample left goes to the emptiest part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(loads)
        parts[part].append(sample)
        heapq.heappush(loads, (load + lengths[sample], part))
    return parts


def _rows(share: list[int], lengths: Sequence[int], limits: BatchLimits) -> list[Row]:
    """Pack samples (longest first) into as few rows as best fit needs, and those as even as they come."""
    if limits.row_tokens is None:
        return [[sample] for sample in share]
    most = limits.micro_batch or len(share)
    rows = _best_fit(share, lengths, limits.row_tokens, most)
    # The same number of rows, dealt again: even rows need less padding.
    even = _even(share, lengths, len(rows))
    longest, longest_even = (max((sum(lengths[i] for i in row) for row in each), default=0) for each in (rows, even))
    return even if longest_even <= longest and max(map(len, even), default=0) <= most else rows


def _best_fit(share: list[int], lengths: Sequence[int], row_tokens: int, row_samples: int) -> list[Row]:
    """Each sample goes to the fullest row that still has room."""
    rows: list[Row] = []
    room: list[int] = []
    for sample in share:
        length = lengths[sample]
        fitting = [i for i, free in enumerate(room) if free >= length and len(rows[i]) < row_samples]
        if fitting:
            best = min(fitting, key=lambda i: (room[i], i))
            rows[best].append(sample)
            room[best] -= length
        else:
            rows.append([sample])
            room.append(max(row_tokens, length) - length)
    return rows


def _micro_batches(rows: list[Row], lengths: Sequence[int], limits: BatchLimits) -> list[list[Row]]:
    """Group rows of like length, as many as the limits allow."""
    rows = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
    groups: list[list[Row]] = []
    for row in rows:
        if groups and _fits([*groups[-1], row], lengths, limits):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _fits(rows: list[Row], lengths: Sequence[int], limits: BatchLimits) -> bool:
    if limits.one_row:
        return False
    # They are sorted: the first is the longest.
    longest, shortest = (sum(lengths[i] for i in row) for row in (rows[0], rows[-1]))
    if limits.same_length_above is not None and longest > limits.same_length_above and shortest != longest:
        return False
    if limits.micro_batch is not None:
        return sum(map(len, rows)) <= limits.micro_batch
    return len(rows) * longest <= limits.micro_tokens


def _stretch(micro_batches: list[list[Row]], num_micro_batches: int) -> list[list[Row]]:
    """The same rows in `num_micro_batches` micro-batches: the fullest are halved,
    and empty ones are added where none is left."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < num_micro_batches:
        fullest = max(range(len(micro_batches)), key=lambda i: len(micro_batches[i]), default=None)
        if fullest is None or len(micro_batches[fullest]) < 2:
            micro_batches.append([])
        else:
            rows = micro_batches[fullest]
            micro_batches[fullest : fullest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return micro_batches
