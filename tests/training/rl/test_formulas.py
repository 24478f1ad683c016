"""The formulas of PPO against those of OpenRLHF, number by number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

CASES = json.loads((Path(__file__).parent / "oracles.json").read_text())["cases"]
AGREE = 1e-6
"""fp64 sums in the same order differ by nothing; what OpenRLHF computes in fp32 by an ulp."""


def cases(name):
    return pytest.mark.parametrize("case", CASES[name], ids=[case["name"] for case in CASES[name]])


def tensor(values, dtype=None):
    import torch

    return torch.tensor(values, dtype=dtype or torch.float64)


def assert_close(got, expected):
    assert float((got - expected).abs().max()) <= AGREE


@cases("gae")
def test_gae(case):
    from training.rl.advantages import gae

    inputs, params = case["inputs"], case["params"]
    mask = tensor(inputs["action_mask"]).bool()
    advantages, returns = gae(tensor(inputs["rewards"]), tensor(inputs["values"]), mask, params["gamma"], params["lam"])
    assert_close(advantages[mask], tensor(case["outputs"]["advantages"])[mask])
    assert_close(returns[mask], tensor(case["outputs"]["returns"])[mask])
    assert not advantages[~mask].any()


@cases("compute_reward")
def test_penalised_rewards(case):
    from training.rl.advantages import penalised_rewards

    inputs, params = case["inputs"], case["params"]
    mask, scores = tensor(inputs["action_mask"]).bool(), tensor(inputs["r"])
    if params["reward_clip_range"]:
        scores = scores.clamp(*params["reward_clip_range"])
    rewards = penalised_rewards(scores, tensor(inputs["kl"]), mask, params["kl_coef"])
    assert_close(rewards[mask], tensor(case["outputs"]["reward"])[mask])
    assert not rewards[~mask].any()


@cases("policy_loss")
def test_policy_loss(case):
    from training.rl.losses import policy_terms

    inputs, params = case["inputs"], case["params"]
    mask, log_probs = tensor(inputs["action_mask"]), tensor(inputs["log_probs"]).requires_grad_()
    terms, clipped = policy_terms(
        log_probs, tensor(inputs["old_log_probs"]), tensor(inputs["advantages"]), params["clip_eps_low"]
    )
    loss = (terms * mask).sum() / mask.sum()
    loss.backward()
    assert_close(loss.detach(), tensor(case["outputs"]["loss"]))
    assert_close(log_probs.grad, tensor(case["outputs"]["grad_log_probs"]))
    assert_close((clipped * mask).sum() / mask.sum(), tensor(case["outputs"]["clip_ratio"]))


@cases("value_loss")
def test_value_loss(case):
    from training.rl.losses import value_terms

    inputs = case["inputs"]
    mask, values = tensor(inputs["action_mask"]), tensor(inputs["values"]).requires_grad_()
    terms = value_terms(values, tensor(inputs["old_values"]), tensor(inputs["returns"]), case["params"]["clip_eps"])
    loss = (terms * mask).sum() / mask.sum()
    loss.backward()
    assert_close(loss.detach(), tensor(case["outputs"]["loss"]))
    assert_close(values.grad, tensor(case["outputs"]["grad_values"]))


@cases("approx_kl")
def test_kl(case):
    import torch

    from training.rl import losses

    inputs = case["inputs"]
    estimate = getattr(losses, case["params"]["kl_estimator"])
    got = estimate(*(tensor(inputs[name], torch.float32) for name in ("log_probs", "log_probs_base")))
    assert_close(got.clamp(-10, 10), tensor(case["outputs"]["kl"], torch.float32))


@cases("logprobs")
def test_log_probabilities_are_those_of_the_temperature(case):
    import torch

    from training.rl.losses import token_log_probs

    inputs = case["inputs"]
    logits, labels = tensor(inputs["logits"], torch.float32), tensor(inputs["labels"], torch.long)
    got = token_log_probs(logits.flatten(0, 1), labels.flatten(), case["params"]["temperature"])
    assert_close(got, tensor(case["outputs"]["logps"], torch.float32).flatten())


@cases("adaptive_kl")
def test_the_adaptive_beta(case):
    from training.rl.advantages import adapted_beta

    params = case["params"]
    beta, betas = params["init"], []
    for kl in case["inputs"]["current"]:
        beta = adapted_beta(beta, kl, params["n_steps"], target=params["target"], horizon=params["horizon"])
        betas.append(beta)
    assert betas == pytest.approx(case["outputs"]["value"], rel=1e-9)


@cases("masked_normalize_rowwise")
def test_whitening(case):
    """Over one row, where OpenRLHF's row by row is the whole batch; and in parts, as workers hold them."""
    from training.rl.advantages import moments, whitened

    x, mask = tensor(case["inputs"]["tensor"]), tensor(case["inputs"]["mask"]).bool()
    whole = whitened(x, mask, moments(x, mask))
    assert_close(whole[mask], tensor(case["outputs"]["out"])[mask])
    half = x.shape[1] // 2
    parts = moments(x[:, :half], mask[:, :half]) + moments(x[:, half:], mask[:, half:])
    assert_close(whitened(x, mask, parts), whole)


def test_the_entropy_of_an_even_distribution_is_the_logarithm_of_its_size():
    import math

    import torch

    from training.rl.losses import entropies

    assert float(entropies(torch.zeros(1, 8))) == pytest.approx(math.log(8))
    assert float(entropies(torch.tensor([[0.0, 50.0]]))) == pytest.approx(0, abs=1e-6)
