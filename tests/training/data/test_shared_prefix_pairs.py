"""Pairs as trees: the same scores and gradients as one sequence after the other, with fewer places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, MistralConfig, Qwen2Config

from training.data.shared_prefix_pairs import mask_of, trees
from training.models.probe import probe
from training.roles.reward import PairLoss, _one_after_the_other

SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip


def pair(shared: int, chosen: int, rejected: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that begin with the same `shared` tokens, differ in the next one, and go on for some."""
    rng = np.random.default_rng(seed)
    trunk, ours, theirs = (rng.integers(3, 50, count) for count in (shared, chosen, rejected))
    if chosen and rejected:
        ours[0], theirs[0] = 1, 2
    return np.concatenate([trunk, ours]), np.concatenate([trunk, theirs])


def test_a_tree_holds_the_trunk_once():
    batch = trees([[(np.array([5, 6, 7, 8]), np.array([5, 6, 9]))], [(np.array([3, 4]), np.array([3, 5]))]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 0, 0]]
    assert batch["branches"].tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, -1, -1]]
    assert batch["last_index"].tolist() == [3, 4, 6, 7]


def test_a_branch_sees_the_trunk_and_itself():
    seen = mask_of(torch.tensor([[0, 1, 1, 2, 3, 4, 5, -1]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


ROWS = {
    "packed": [[pair(7, 3, 5), pair(2, 4, 1, 1)], [pair(1, 2, 2, 2)]],
    "nothing in common": [[pair(0, 3, 2), pair(0, 1, 1, 1)]],
    "one goes on where the other ends": [[pair(6, 0, 4), pair(5, 3, 0, 1)]],
    "the same twice": [[pair(4, 0, 0)]],
    "one token each": [[pair(1, 0, 0), pair(0, 1, 1)]],
}


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_trees_change_neither_losses_nor_gradients(rows, family):
    torch.manual_seed(0)
    lm = AutoModelForSequenceClassification.from_config(family(**SHAPE), attn_implementation="sdpa").double()
    assert probe(lm.config).kernel("sdpa").trees
    module = PairLoss(lm)
    margins = torch.zeros(sum(map(len, rows)), dtype=torch.double)
    found = []
    for batch in (_one_after_the_other(rows), trees(rows)):
        module.zero_grad()
        sums = module(**batch, margins=margins)
        sums[0].backward()
        found.append((sums.detach(), [p.grad for p in module.parameters()]))
    (plain, gradients), (shared, shared_gradients) = found
    # Scores are rounded to fp32 before they are compared; an order of sums is all that differs.
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        (LlamaConfig(**SHAPE), "eager"),
        (LlamaConfig(**SHAPE), "flash_attention_2"),
        (MistralConfig(**SHAPE, sliding_window=8), "sdpa"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sdpa"),
    ],
    ids=["eager", "flash", "a window in all layers", "a window in some layers"],
)
def test_where_a_mask_does_not_say_it_all_pairs_stay_apart(config, kernel):
    assert not probe(config).kernel(kernel).trees
