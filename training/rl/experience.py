"""The experience of an iteration of PPO: responses, and the values of each role per token. Arrays small enough to
send.

Roles get responses as a deal: by worker, micro-batch and row. Their answers come back one array a
response, in that order.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.batching import BatchLimits, partition_batch
from training.data.collate import collate


@dataclass(frozen=True, kw_only=True)
class Response:
    """A continuation of a prompt."""

    place: int
    """Among the responses of the iteration."""
    number: int
    """Of the prompt, in the data."""
    sample: int
    """Which of the responses to that prompt."""
    prompt: NDArray[np.int64]
    """[P] token ids."""
    tokens: NDArray[np.int64]
    """[T] those that the policy chose, the end-of-text token included."""
    ended: bool
    """By an end-of-text token, not by the length."""
    row: dict[str, Any]
    """The row that the prompt came from."""
    text: str
    """What the tokens say."""

    def __len__(self) -> int:
        """P + T."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Item:
    """A response as a role that computes on it needs it."""

    ids: NDArray[np.int64]
    """[P + T] prompt and response."""
    start: int
    """P."""
    fields: Mapping[str, NDArray[np.float32]]
    """[T] each, what is known of its tokens so far."""


Share = list[list[list[Item]]]
"""What one worker computes on: micro-batches of rows of items."""


class Experience:
    """Responses of an iteration. `facts[name][i]` is known of response i: of its tokens,
    [T_i], or of the whole, [1]."""

    def __init__(self, responses: Sequence[Response]):
        self.responses = list(responses)
        self.fields: dict[str, list[NDArray[np.float32]]] = {}

    def __len__(self) -> int:
        return len(self.responses)

    @classmethod
    def together(cls, parts: Sequence[Experience]) -> Experience:
        """Parts of which the same is known, as one: in an order that does not depend on who wrote what, and when."""
        every = [(part, i) for part in parts for i in range(len(part))]
        every.sort(key=lambda one: one[0].responses[one[1]].place)
        out = cls([part.responses[i] for part, i in every])
        out.fields = {name: [part.fields[name][i] for part, i in every] for name in parts[0].fields}
        return out

    def shard(
        self, size: int, limits: BatchLimits, names: Sequence[str] = (), places: Sequence[int] | None = None
    ) -> tuple[list[Share], list[int]]:
        """Shares for `size` workers of the responses at `places` (None: all), with these facts;
        and the order of the answers."""
        chosen = range(len(self)) if places is None else places
        by_worker = partition_batch([len(self.responses[i]) for i in chosen], size, limits)
        micro_batches = [
            [[[chosen[place] for place in row] for row in rows] for rows in of_worker] for of_worker in by_worker
        ]
        shares = [
            [[[self._item(i, names) for i in row] for row in rows] for rows in of_worker] for of_worker in micro_batches
        ]
        return shares, [i for of_worker in micro_batches for rows in of_worker for row in rows for i in row]

    def _item(self, i: int, names: Sequence[str]) -> Item:
        response = self.responses[i]
        ids = np.concatenate([response.prompt, response.tokens])
        return Item(ids, len(response.prompt), {name: self.fields[name][i] for name in names})

    def set(self, name: str, order: Sequence[int], answers: Sequence[Sequence[NDArray[np.float32]]]) -> None:
        """Remember what workers have answered about the responses that they were dealt in this order."""
        self.fields[name] = [np.empty(0, np.float32)] * len(self)
        for i, values in zip(order, (values for of_worker in answers for values in of_worker), strict=True):
            self.fields[name][i] = values

    def padded(self, name: str) -> Tensor:
        """[B, T] of a fact, 0 behind the end of a response."""
        longest = max(len(response.tokens) for response in self.responses)
        out = np.zeros((len(self), longest), np.float32)
        for row, values in zip(out, self.fields[name], strict=True):
            row[: len(values)] = values
        return torch.from_numpy(out)

    @property
    def mask(self) -> Tensor:
        """[B, T] which places are tokens of a response."""
        lengths = torch.tensor([len(response.tokens) for response in self.responses])
        return torch.arange(int(lengths.max()))[None] < lengths[:, None]

    def unpad(self, name: str, values_BT: Tensor) -> None:
        """Remember what was worked out for all responses together."""
        lengths = (len(response.tokens) for response in self.responses)
        self.fields[name] = [row[:length].numpy() for row, length in zip(values_BT.float(), lengths, strict=True)]

    def dumped(self) -> str:
        """All of it as text, to go on from after an interruption."""
        responses = [
            {**asdict(each), "prompt": each.prompt.tolist(), "tokens": each.tokens.tolist()} for each in self.responses
        ]
        fields = {name: [values.tolist() for values in of_all] for name, of_all in self.fields.items()}
        raw = json.dumps({"responses": responses, "facts": fields}, default=str).encode()
        return base64.b64encode(zlib.compress(raw)).decode()

    @classmethod
    def loaded(cls, text: str) -> Experience:
        """What `dumped` has made of it."""
        raw = json.loads(zlib.decompress(base64.b64decode(text)))
        ids = {"prompt": np.int64, "tokens": np.int64}
        out = cls(
            [
                Response(**{**each, **{name: np.array(each[name], kind) for name, kind in ids.items()}})
                for each in raw["responses"]
            ]
        )
        out.fields = {
            name: [np.array(values, np.float32) for values in of_all] for name, of_all in raw["facts"].items()
        }
        return out

    def table(self, count: int) -> list[dict[str, Any]]:
        """Some responses, for people: the least and the most rewarded, and the first others, which nobody chose."""
        scores = [float(score[0]) for score in self.fields["score"]]
        by_score = sorted(range(len(self)), key=lambda i: scores[i])
        extremes = [by_score[0], by_score[-1]]
        chosen = list(dict.fromkeys([*extremes, *(i for i in range(len(self)) if i not in extremes)]))[:count]
        return [
            {
                "row": response.row, "sample": response.sample, "response": response.text,
                "reward": scores[i],
                "kl": float((self.fields["old"][i] - self.fields["reference"][i]).sum()),
                "ended": response.ended,
            }
            for i in chosen
            for response in (self.responses[i],)
        ]  # fmt: skip


def collated(rows: Sequence[Sequence[Item]], names: Sequence[str]) -> dict[str, Tensor | None]:
    """A micro-batch: tensors of `collate` with the N response tokens as targets,
    `counts` [N] (0: does not count), and the facts [N]."""
    samples = [[(item.ids, np.arange(len(item.ids)) >= item.start) for item in row] for row in rows]
    batch = collate(samples)
    index = batch["target_index"]
    assert index is not None
    fields = {name: _joined([item.fields[name] for row in rows for item in row], len(index)) for name in names}
    return {**batch, "counts": torch.full((len(index),), 1.0 if rows else 0.0), **fields}


def _joined(parts: Sequence[NDArray[np.float32]], count: int) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(count)


def split(share: Share, values: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """What was computed of each micro-batch, [N] each, as one array an item."""
    return [part for rows, of_micro in zip(share, values, strict=True) for part in _split(rows, of_micro.numpy())]


def _split(rows: Sequence[Sequence[Item]], values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    start = 0
    for item in (item for row in rows for item in row):
        stop = start + len(item.ids) - item.start
        yield values[start:stop]
        start = stop
