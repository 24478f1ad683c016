"""Attention sample by sample: what it computes, and which models and masks it is for."""

import pytest

from training.data.batching import SDPA_VARLEN

pytestmark = pytest.mark.cpu

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def family(name, attention, **settings):
    """A tiny model of a family, in fp64: then only wrong masks make a difference."""
    import torch
    import transformers

    from training.models import attention as kernels

    kernels.register()
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **settings)
    lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return lm.double().train()


def packed(*lengths):
    """One row of samples: ids and positions. [1, L]"""
    import torch

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def hidden(lm, ids, positions, **more):
    return lm.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **more).last_hidden_state


def masks_seen(monkeypatch):
    """What the attention was handed as masks: their numbers of dimensions."""
    from training.models import attention

    seen = []
    plain = attention._attention

    def spied(module, query, key, value, attention_mask, **settings):
        seen.append(None if attention_mask is None else attention_mask.dim())
        return plain(module, query, key, value, attention_mask, **settings)

    monkeypatch.setattr(attention, "_attention", spied)  # what `register` registers from now on
    return seen


@pytest.mark.parametrize(
    ("name", "settings", "lengths"),
    [
        ("Llama", {}, (9, 4, 1, 12)),
        ("Qwen2", {}, (9, 4, 1, 12)),
        ("Mistral", {"sliding_window": None}, (9, 4, 1, 12)),
        ("Mistral", {"sliding_window": 12}, (9, 4, 1, 12)),
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 16}, (9, 4, 1, 12)),
        ("GPTNeoX", {}, (9, 4, 1, 12)),
    ],
)
def test_packed_rows_are_computed_as_with_a_mask_and_without_one(monkeypatch, name, settings, lengths):
    import torch

    if name == "GPTNeoX":
        monkeypatch.delitem(SHAPE, "num_key_value_heads")
    seen = masks_seen(monkeypatch)
    ids, positions = packed(*lengths)
    grads = []
    for attention in ("sdpa", SDPA_VARLEN):
        lm = family(name, attention, **settings)
        out = hidden(lm, ids, positions)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        grads.append([out.detach(), *(p.grad for p in lm.get_decoder().parameters())])
    assert seen == [1, 1]  # lengths, in each of the two layers
    for masked, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Mistral", {"sliding_window": 5}), ("Gemma3Text", {"head_dim": 8, "sliding_window": 5})],
)
def test_a_window_shorter_than_a_sample_takes_its_mask(monkeypatch, name, settings):
    import torch

    seen = masks_seen(monkeypatch)
    ids, positions = packed(9, 4, 12)
    ours, masked = (hidden(family(name, kernel, **settings), ids, positions) for kernel in (SDPA_VARLEN, "sdpa"))
    assert 4 in seen
    torch.testing.assert_close(ours, masked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "rows", ["padded rows", "several packed rows", "a mask of one's own", "a prompt with padding before it"]
)
def test_all_other_rows_are_computed_as_by_torch(monkeypatch, rows):
    import torch

    seen = masks_seen(monkeypatch)
    ids, positions = packed(9, 4, 12)
    more = {}
    if rows == "padded rows":
        ids, positions = ids.repeat(2, 1), None
    elif rows == "several packed rows":
        ids, positions = ids.repeat(2, 1), torch.stack([positions[0], positions[0].flip(0).argsort()])
    elif rows == "a mask of one's own":
        more["attention_mask"] = torch.ones(25, 25, dtype=torch.bool).tril()[None, None]
    else:
        more["attention_mask"] = (torch.arange(25) > 3)[None].long()
    ours, plain = (hidden(family("Llama", kernel), ids, positions, **more)[:, 4:] for kernel in (SDPA_VARLEN, "sdpa"))
    assert set(seen) <= {None, 4}
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
