"""Losses over chunks of places: the same numbers, and never the logits of all places at once."""

from __future__ import annotations

import pytest

from tests.support import training_fixtures
from tests.support.chunked_trainer import LOGITS_AT_ONCE
from tests.support.training_fixtures import Recorder, phase_of

pytestmark = pytest.mark.cpu

VOCABULARY, PLACES = 50, 37
AT_ONCE = 7 * VOCABULARY


@pytest.fixture
def lm():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def micro():
    import torch

    torch.manual_seed(2)
    index = torch.randperm(80)[:PLACES].sort().values
    targets = torch.randint(VOCABULARY, (PLACES,))
    return {
        "input_ids": torch.randint(VOCABULARY, (2, 40)), "position_ids": None, "target_index": index,
        "target_ids": targets,
    }  # fmt: skip


def of_policy(lm, micro):
    import torch

    from training.config import PPO
    from training.rl.modules import PolicyLoss

    phase = PPO.model_validate(
        {
            "recipe": "ppo",
            "model": {"path": "-"},
            "data": {"train": "-"},
            "reward": "-",
            "entropy": 0.1,
            "temperature": 0.7,
        }
    )
    module = PolicyLoss(lm, phase, lambda: None)
    torch.manual_seed(3)
    of_each = {"counts": torch.ones(PLACES), "advantages": torch.randn(PLACES)}
    return lambda: module(**micro, **of_each, old=torch.full((PLACES,), -3.0))


def of_tokens(lm, micro):
    from training.models.loading import TokenLoss

    module = TokenLoss(lm)
    return lambda: module(**micro)


def learnt(lm, compute):
    """The sums and the gradients."""
    lm.zero_grad()
    sums = compute()
    sums[0].backward()
    return sums.detach(), {name: p.grad.clone() for name, p in lm.named_parameters()}


@pytest.mark.parametrize("made", [of_tokens, of_policy])
def test_chunks_change_neither_losses_nor_gradients(lm, micro, made, monkeypatch):
    import torch

    compute = made(lm, micro)
    whole, gradients = learnt(lm, compute)
    monkeypatch.setattr("training.models.chunked_logits.LOGITS_AT_ONCE", AT_ONCE)
    chunked, of_chunks = learnt(lm, compute)
    with torch.no_grad():
        asked = compute()
    # Sums of 37 fp32 terms, in another order.
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(asked, whole, rtol=1e-6, atol=1e-6)
    # Of both signs: what matters is the largest. Some units in the last place (6e-8)
    # on the way back through two layers.
    for name, gradient in gradients.items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(of_chunks[name], gradient, rtol=0, atol=atol, msg=name)
    assert "forward" not in vars(lm.lm_head), "the head is its own again"


@pytest.mark.parametrize("made", [of_tokens, of_policy])
def test_the_logits_never_exist_whole(lm, micro, made, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """Remembers the most rows that a tensor over the vocabulary had, weights aside."""

        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                shape = getattr(tensor, "shape", ())
                if len(shape) == 2 and shape[-1] == VOCABULARY:
                    self.rows = max(self.rows, shape[0])
            return out

    compute = made(lm, micro)
    with Largest() as whole:
        compute()[0].backward()
    monkeypatch.setattr("training.models.chunked_logits.LOGITS_AT_ONCE", AT_ONCE)
    with Largest() as chunked:
        compute()[0].backward()
    # The head's gradient is looked at transposed: [hidden 32, vocabulary].
    assert whole.rows == PLACES
    assert chunked.rows in (7, 32)


@pytest.mark.parametrize(("workers", "stage"), [(2, 3), (2, 2)])
def test_chunks_over_sharded_weights(tiny, train, tmp_path, workers, stage):
    from tests.support.fork_group import ForkGroup
    from training.recipes import RECIPES, resolve

    settings = {"max_steps": 4, "data": {"eval": str(tiny / "eval.jsonl")}}
    whole = train(1, stage=0, **settings)
    phase, hooks = phase_of(tiny, "sft", workers=workers, stage=stage, **settings), Recorder(tmp_path)
    with ForkGroup(workers, "tests.support.chunked_trainer:ChunkedTrainer", phase, str(tiny / "cache")) as group:
        resolve(RECIPES["sft"].run)(phase, {"trainer": group}, hooks)
    assert hooks.losses == pytest.approx(whole.losses, rel=1e-6)  # as in test_same_curve
    assert hooks.rows[-1]["eval_loss"] == pytest.approx(whole.rows[-1]["eval_loss"], rel=1e-6)
    places = [row["target_tokens"] / workers for row in hooks.rows if "loss" in row]
    assert min(places) * training_fixtures.VOCABULARY > 2 * LOGITS_AT_ONCE, "there is something to cut"
