"""Steps of a phase and the learning rate at each, against the definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from training.config import SFT, Schedule
from training.schedule import learning_rate, total_samples, total_steps


def phase(**settings) -> SFT:
    return SFT.model_validate({"recipe": "sft", "model": {"path": "m"}, "data": {"train": "d"}, **settings})


@pytest.mark.parametrize(
    ("settings", "epoch", "samples", "steps"),
    [
        ({"batch": 10}, 100, 100, 10),
        ({"batch": 10, "epochs": 2.0}, 100, 200, 20),
        ({"batch": 64}, 100, 100, 2),
        ({"batch": 10, "epochs": 0.5}, 100, 50, 5),
        ({"batch": 10, "epochs": 0.001}, 100, 1, 1),
        ({"batch": 10, "max_steps": 7}, 100, 70, 7),
        ({"batch": 10, "max_steps": 70}, 100, 700, 70),
        ({"batch": 1000}, 3, 3, 1),
    ],
)
def test_samples_and_steps(settings, epoch, samples, steps):
    assert total_samples(phase(**settings), epoch) == samples
    assert total_steps(phase(**settings), epoch) == steps


def rates(total: int, **schedule) -> list[float]:
    return [learning_rate(2.0, Schedule.model_validate(schedule), step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_rises_in_a_line_to_the_peak(name):
    assert rates(100, name=name, warmup=4)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates(100, name=name, warmup=0.04)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_falls_all_the_way_to_the_floor_at_the_last_step(name):
    curve = rates(50, name=name, warmup=0.1, floor=0.1)
    assert max(curve) == curve[4] == 2.0
    assert all(later < earlier for earlier, later in pairwise(curve[4:]))
    assert curve[-1] == pytest.approx(0.2)


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(101, name="cosine", warmup=1, floor=0.0)[50] == pytest.approx(1.0)
    assert rates(101, name="cosine", warmup=1, floor=0.0)[25] == pytest.approx(1 + math.cos(math.pi / 4))


def test_constant_stays_at_the_peak():
    assert set(rates(50, name="constant", warmup=2, floor=0.1)[1:]) == {2.0}


def test_without_warm_up_the_first_step_is_already_on_the_curve():
    first = rates(100, name="linear", warmup=0, floor=0.0)[0]
    assert first == pytest.approx(2.0 * 0.99)


def test_a_warm_up_longer_than_the_phase_rises_to_its_end():
    assert rates(4, name="cosine", warmup=100) == [0.5, 1.0, 1.5, 2.0]


def test_one_step_has_a_rate():
    assert rates(1, name="cosine", warmup=0.03) == [2.0]
    assert rates(1, name="cosine", warmup=0, floor=0.1) == [pytest.approx(0.2)]
