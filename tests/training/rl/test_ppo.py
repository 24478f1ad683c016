"""PPO over real workers: it learns, its curve does not depend on the machines, it resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.cpu
NINES = "tests.some_rewards:nines"


def settings(tiny, **more):
    return {
        "recipe": "ppo", "reward": NINES, "critic": str(tiny / "model"), "rollout_batch": 16, "batch": 8, "response_tokens": 8,
        "max_steps": 3, "learning_rate": 1e-3, "critic_learning_rate": 3e-3, "data": {"max_length": 64}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(tiny, train):
    """One worker without ZeRO."""
    return train(1, **settings(tiny))


def curve(hooks):
    names = ("reward", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "critic_grad_norm", "response_tokens")
    return np.array([[row[name] for name in names] for row in hooks.rows if "reward" in row])


def test_the_first_iteration_is_at_the_reference(plain):
    first = plain.rows[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert {"iteration", "explained_variance", "ended", "clip_fraction", "generate_s", "score_s", "learn_s"} <= first.keys()


@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (1, 2), (2, 3)])
def test_the_curve_does_not_depend_on_the_machines(tiny, train, plain, workers, stage):
    assert curve(train(workers, stage=stage, **settings(tiny))) == pytest.approx(curve(plain), rel=1e-3, abs=1e-4)


def test_it_learns_what_is_rewarded(tiny, train):
    hooks = train(1, **settings(tiny, max_steps=25, rollout_batch=32, batch=16))
    rewards = [row["reward"] for row in hooks.rows if "reward" in row]
    print(rewards)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 1
