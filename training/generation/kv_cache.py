"""A key-value cache for generation with room for the tokens to come.

transformers' own cache grows by concatenation: every token copies all that came before it, in every layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from training.estimate.memory import CACHE_ROOM


def give_room(cache: Any) -> None:
    """Let the layers of a cache keep room from now on, those that hold every place;
    sliding windows and other states stay as they are."""
    cache.layers = [RoomyLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]


class RoomyLayer(DynamicLayer):
    """One layer: `keys` and `values` [B, H, L, D] are the written part of larger tensors."""

    _room: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> RoomyLayer:
        """What the layer holds."""
        roomy = cls()
        vars(roomy).update(vars(layer))
        return roomy

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            self._room = _moved(self.keys, end + CACHE_ROOM), _moved(self.values, end + CACHE_ROOM)
        keys, values = self._room
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None


def _moved(held: Tensor, places: int) -> Tensor:
    *outer, length, size = held.shape
    moved = held.new_empty(*outer, places, size)
    moved[..., :length, :] = held
    return moved
