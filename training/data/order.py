"""Which sample stands at which position of the training order: a function of (seed, sizes, weights) alone.

The order is one endless sequence of positions, epoch after epoch. A position is the whole state of the data, so a run
resumes by knowing how many samples it has trained on. Nothing is stored: a position is computed when it is asked for,
in memory that does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.seeding import seed_for

Indices = NDArray[np.int64]

_ROUNDS = 6


class Order:
    """The training order over one or several sources whose samples are numbered one after the other.

    `sizes[i]` is the number of samples of source i. Without `weights` every sample comes once an epoch. With them an
    epoch still has sum(sizes) samples, shared out in the ratio of the weights; a source that is used up before the
    epoch ends starts again in a new order, and one that is not goes on where it stopped in the next epoch.

    Raises ValueError when there is no sample.
    """

    def __init__(
        self, sizes: Sequence[int], *, weights: Sequence[float] | None = None, seed: int, shuffle: bool = True
    ):
        if sum(sizes) == 0:
            raise ValueError("there is no sample to put in order")
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.epoch_size = int(self.sizes.sum())
        self.shares = self.sizes if weights is None else _shares(self.epoch_size, np.asarray(weights, dtype=np.float64))
        self.seed = seed
        self.shuffle = shuffle

    def samples(self, start: int, stop: int) -> Indices:
        """Sample numbers at positions start..stop-1. [stop - start]"""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs, slots = np.divmod(positions, self.epoch_size)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._in_epoch(int(epoch), slots[here])
        return out

    def _in_epoch(self, epoch: int, slots: Indices) -> Indices:
        if self.shuffle:
            slots = permute(slots, self.epoch_size, seed_for(self.seed, "order", epoch))
        # A slot belongs to the source in whose share it lies; within it, slot number j is the source's draw number
        # epoch * share + j, and every full pass over the source is a permutation of its own.
        bounds = np.cumsum(self.shares)
        source = np.searchsorted(bounds, slots, side="right")
        draws = epoch * self.shares[source] + slots - (bounds - self.shares)[source]
        passes, offsets = np.divmod(draws, self.sizes[source])
        if self.shuffle:
            for key in {(int(s), int(p)) for s, p in zip(source, passes, strict=True)}:
                here = (source == key[0]) & (passes == key[1])
                offsets[here] = permute(offsets[here], int(self.sizes[key[0]]), seed_for(self.seed, "source", *key))
        return self.starts[source] + offsets


def _shares(total: int, weights: NDArray[np.float64]) -> Indices:
    """`total` cut into whole numbers in the ratio of the weights (largest remainders)."""
    exact = total * weights / weights.sum()
    shares: Indices = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - int(shares.sum())]] += 1
    return shares


def permute(index: Indices, size: int, key: int) -> Indices:
    """Where a pseudo-random permutation of range(size) sends each index; equal for equal (size, key). [n] -> [n]

    A Feistel network over the next power of four, walked until it lands inside the range (cycle walking), so that the
    permutation needs no memory however large `size` is. Source: Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    out = _feistel(index.astype(np.uint64), half_bits, key)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half_bits, key)
    return out.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(right ^ np.uint64(seed_for(key, "round", number))) & mask)
    return (left << shift) | right


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every output bit depends on every input bit. [n] -> [n]"""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
