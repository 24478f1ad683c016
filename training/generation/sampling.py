"""Continues token sequences: batched, with a cache, without spending time on finished rows. Knows no text and no file.

What is drawn does not depend on the machines: the random number that picks the token at a position is a function of the
sequence's key and the position alone (a counter-based generator), and picks by the inverse of the distribution
function. So the batch size, the order and the number of workers do not show, except where rounding moves a probability
across the number that was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.order import mix
from training.data.vocabulary import beyond, rows_in
from training.errors import InputError
from training.estimate.model_traits import traits_of
from training.generation.kv_cache import give_room
from training.process import heartbeat

Heard = Callable[[int, int], None]
"""Is told which prompt goes on, and with what token."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHRINK_BELOW = 0.75
"""The batch is cut to the rows that go on when fewer than this share do: cutting copies the cache."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""


@dataclass(frozen=True)
class Continued:
    """One continuation."""

    tokens: list[int]
    """Without the token that ended it."""
    end: int | None
    """The end-of-text token that ended it; None: the length did."""

    @property
    def ended(self) -> bool:
        """By an end-of-text token, not by the length."""
        return self.end is not None


def generate_all(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    ends: Collection[int],
    settings: Sampling,
    *,
    batch: int = 64,
    window: int | None = None,
    heard: Heard | None = None,
) -> list[Continued]:
    """One continuation of every prompt, in their order, up to a token of `ends`. `keys[i]` seeds the i-th.

    `lm` is a causal language model; a prompt has at least one token. At most `batch` go at a time, those of like length
    together (one, where the model cannot do more); of these, equal prompts are read once. No prompt goes on past
    `window` tokens, itself counted. `heard(i, token)` is told every token of the i-th continuation as it is drawn.
    Raises InputError for tokens that the model's embedding has no row for.
    """
    out: dict[int, Continued] = {}
    for continued in in_batches(lm, prompts, keys, ends, settings, batch=batch, window=window, heard=heard):
        out |= continued
    return [out[place] for place in range(len(prompts))]


@torch.inference_mode()
def in_batches(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    ends: Collection[int],
    settings: Sampling,
    *,
    batch: int = 64,
    window: int | None = None,
    heard: Heard | None = None,
) -> Iterator[dict[int, Continued]]:
    """What `generate_all` returns, batch by batch: the continuations
    by the numbers of their prompts. Raises as it does."""
    if wrong := beyond((max(prompt, default=-1) for prompt in prompts), rows_in(lm)):
        raise InputError.of("the prompts", wrong)
    longest = max(map(len, prompts), default=0) + settings.max_new_tokens
    batch = batch if traits_of(lm).batches(longest) else 1
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    for start in range(0, len(by_length), batch):
        places = by_length[start : start + batch]
        going = _Batch(lm, [prompts[i] for i in places], [keys[i] for i in places], ends, settings, window)
        texts: list[list[int]] = [[] for _ in places]
        ended: dict[int, int] = {}
        for row, token, is_end in going.drawn():
            if is_end:
                ended[row] = token
                continue
            texts[row].append(token)
            if heard is not None:
                heard(places[row], token)
        yield {place: Continued(texts[row], ended.get(row)) for row, place in enumerate(places)}


class _Batch:
    """Prompts of a batch on their way, padded on the left. B rows that go on, L places so far."""

    def __init__(
        self,
        lm: Any,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        ends: Collection[int],
        settings: Sampling,
        window: int | None,
    ):
        self.lm, self.settings = lm, settings
        self.caches = traits_of(lm).generation != "uncached"
        """Else all tokens are read again for each new one."""
        self.device = next(lm.parameters()).device
        self.rows = np.arange(len(prompts))
        """Which prompt each row is."""
        self.keys = np.array(keys, np.uint64)
        self.ends = torch.tensor(sorted(ends), device=self.device)
        self.window = window
        most = settings.max_new_tokens
        self.limits = [most if window is None else min(most, window - len(prompt)) for prompt in prompts]
        """How long the continuation of each prompt may be."""
        distinct = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.read_as = np.array([distinct[tuple(prompt)] for prompt in prompts])
        """Of each prompt the row in which it is read: several that are the same share one until the first token."""
        length = max(map(len, prompts))
        self.padded = any(len(prompt) < length for prompt in prompts)
        ids, mask = np.zeros((len(distinct), length), np.int64), np.zeros((len(distinct), length), np.int64)
        for row, prompt in enumerate(distinct):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        self.next_ids = torch.from_numpy(ids).to(self.device)
        self.mask = torch.from_numpy(mask).to(self.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache: Any = None

    def drawn(self) -> Iterator[tuple[int, int, bool]]:
        """Of every prompt its tokens as they are drawn, up to the one that ends it: which prompt,
        token, whether it is an end."""
        done = {row for row, limit in enumerate(self.limits) if limit <= 0}
        for position in range(max(self.limits)):
            logits_BV = self._logits() if position else self._first_logits()
            tokens_B = draw(logits_BV, self.keys, position, self.settings)
            is_end_B = torch.isin(tokens_B, self.ends).tolist()
            for row, token, is_end in zip(self.rows.tolist(), tokens_B.tolist(), is_end_B, strict=True):
                if row in done:
                    continue
                if is_end or position + 1 == self.limits[row]:
                    done.add(row)
                yield row, token, is_end
            heartbeat.progressed()
            if len(done) == len(self.limits):
                break
            self._advance(tokens_B)
            going = np.array([row not in done for row in self.rows.tolist()])
            if going.mean() < _SHRINK_BELOW:
                self._shrink(np.flatnonzero(going))

    def _first_logits(self) -> Tensor:
        """Of the first token of every prompt. [B, V]"""
        logits_DV = self._logits()
        if len(logits_DV) == len(self.read_as):
            return logits_DV
        self._select(self.read_as)
        return logits_DV[torch.from_numpy(self.read_as).to(self.device)]

    def _logits(self) -> Tensor:
        """Of the next token of every row. [B, V]"""
        if not self.caches:
            out = self.lm(input_ids=self.next_ids, use_cache=False)
            return torch.as_tensor(out.logits[:, -1])
        out = self.lm(
            input_ids=self.next_ids,
            attention_mask=self.mask if self.padded else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self.cache is None:
            self.cache = out.past_key_values
            give_room(self.cache)
        return torch.as_tensor(out.logits[:, -1])

    def _advance(self, tokens: Tensor) -> None:
        self.next_ids = tokens[:, None] if self.caches else torch.cat([self.next_ids, tokens[:, None]], dim=1)
        self.positions = self.positions[:, -1:] + 1
        if self.window is not None:  # rows that are done still go along until the batch is cut
            self.positions = self.positions.clamp(max=self.window - 1)
        if self.padded:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def _shrink(self, places: NDArray[np.int64]) -> None:
        self._select(places)
        self.rows, self.keys = self.rows[places], self.keys[places]

    def _select(self, places: NDArray[np.int64]) -> None:
        """Let the model go on with these of its rows."""
        index = torch.from_numpy(places).to(self.device)
        self.cache.batch_select_indices(index)
        self.next_ids, self.positions, self.mask = self.next_ids[index], self.positions[index], self.mask[index]


def draw(logits_BV: Tensor, keys: NDArray[np.uint64], position: int, settings: Sampling) -> Tensor:
    """The next token of each row. [B]"""
    return sample_token(logits_BV, torch.from_numpy(uniform(keys, position)).to(logits_BV.device), settings)


def sample_token(logits_BV: Tensor, drawn_B: Tensor, settings: Sampling) -> Tensor:
    """The token of each row that a number drawn from [0, 1) picks. [B]"""
    if settings.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = torch.softmax(logits_BV.double() / settings.temperature, -1)
    if settings.top_p < 1:
        probabilities_BV = _nucleus(probabilities_BV, settings.top_p)
    cumulated_BV = probabilities_BV.cumsum(-1)
    scaled_B1 = drawn_B[:, None] * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, scaled_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)


def _nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together have probability `top_p` (arXiv:1904.09751), the others at 0."""
    ordered_BV, places_BV = probabilities_BV.sort(dim=-1, descending=True)
    before_BV = ordered_BV.cumsum(-1) - ordered_BV
    return torch.zeros_like(probabilities_BV).scatter(-1, places_BV, ordered_BV.masked_fill(before_BV >= top_p, 0.0))


def uniform(keys: NDArray[np.uint64], position: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each key at this position, or at its own. [n] -> [n]"""
    # Arrays wrap around, as SplitMix64 wants it.
    counters = keys + np.atleast_1d(np.asarray(position)).astype(np.uint64) * _GOLDEN + _GOLDEN
    return (mix(mix(counters)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
