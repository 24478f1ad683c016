"""A micro-batch says the same of a sample, whatever row it lies in."""

import numpy as np
import pytest

from training.data.collate import IGNORED, collate


def sample(length, first_target, seed=0):
    ids = np.random.default_rng(seed).integers(1, 50, length)
    return ids, np.arange(length) >= first_target


def test_targets_are_predicted_from_the_place_before_them():
    a, b, c = sample(5, 3, 1), sample(4, 1, 2), sample(6, 5, 3)
    batch = collate([[a, b], [c]])
    flat = batch["input_ids"].flatten()
    assert batch["input_ids"].shape == (2, 9)
    assert batch["target_index"].tolist() == [2, 3, 5, 6, 7, 13]
    assert batch["target_ids"].tolist() == [*a[0][3:], *b[0][1:], c[0][5]]
    assert (flat[batch["target_index"] + 1] == batch["target_ids"]).all()


def test_positions_start_again_with_each_sample_and_with_the_padding():
    batch = collate([[sample(3, 1), sample(2, 1)], [sample(2, 1)]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_rows_of_one_sample_need_no_positions():
    assert collate([[sample(3, 1)], [sample(2, 1)]])["position_ids"] is None


def test_an_empty_turn_teaches_nothing():
    import torch

    batch = collate([])
    logits = torch.randn(1, 7, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, batch["target_ids"], reduction="sum")
    loss.backward()
    assert batch["target_ids"].tolist() == [IGNORED]
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().max()) == 0


@pytest.mark.cpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_that_share_a_row_do_not_see_each_other(tiny_llama, attention):
    import torch

    from training.models.loading import TokenLoss

    model = TokenLoss(tiny_llama(attention))
    samples = [sample(length, 2, seed) for seed, length in enumerate([9, 4, 7, 3, 12])]
    with torch.no_grad():
        apart = sum(float(model(**collate([[s]]))) for s in samples)
        packed = float(model(**collate([[samples[0], samples[1], samples[3]], [samples[2], samples[4]]])))
        padded = float(model(**collate([[s] for s in samples])))
    # fp32 sums of about 100 terms in other orders.
    assert packed == pytest.approx(apart, rel=1e-6)
    assert padded == pytest.approx(apart, rel=1e-6)


@pytest.fixture
def tiny_llama():
    def build(attention):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.3, attn_implementation=attention,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return build
