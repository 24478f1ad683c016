"""A cache with room holds what transformers' own holds, and copies it seldom."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.cpu


def layers():
    """transformers' own and one with room, after the same prompt."""
    import torch
    from transformers.cache_utils import DynamicLayer

    from training.generation.kv_cache import RoomyLayer

    own, other = DynamicLayer(), DynamicLayer()
    prompt = torch.rand(4, 2, 5, 3)
    for layer in (own, other):
        layer.update(prompt, prompt + 1)
    return own, RoomyLayer.of(other)


def test_it_holds_the_same_while_rows_leave():
    import torch

    own, roomy = layers()
    for number in range(200):
        token = torch.rand(len(own.keys), 2, 1, 3)
        told = [layer.update(token, -token) for layer in (own, roomy)]
        assert all(torch.equal(*pair) for pair in zip(*told, strict=True))
        if number in (30, 100):
            for layer in (own, roomy):
                layer.batch_select_indices(torch.tensor([0, 2] if number == 30 else [1]))
    assert roomy.get_seq_length() == own.get_seq_length() == 205


def test_what_is_held_is_moved_once_in_many_tokens():
    import torch

    from training.estimate.memory import CACHE_ROOM

    _, roomy = layers()
    token = torch.rand(4, 2, 1, 3)
    places = [roomy.update(token, token)[0].data_ptr() for _ in range(200)]
    moves = sum(here != before for here, before in zip(places[1:], places, strict=False))
    assert moves <= 200 // CACHE_ROOM


def test_layers_that_hold_a_window_stay_as_they_are():
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    from training.generation.kv_cache import RoomyLayer, give_room

    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=8)]
    for number in range(2):
        cache.update(torch.rand(1, 2, 5, 3), torch.rand(1, 2, 5, 3), number)
    give_room(cache)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, DynamicSlidingWindowLayer]
    assert cache.get_seq_length() == 5
