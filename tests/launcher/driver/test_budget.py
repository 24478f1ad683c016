"""max_hours and max_cost: counted over all attempts, kept, told; the run is saved and goes on when they are raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.driver.budget import Budget
from training.errors import InputError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_hours_and_cost_are_counted_while_workers_are_held_and_go_on_in_the_next_attempt(tmp_path):
    clock = Clock()
    budget = Budget(tmp_path, max_hours=3, max_cost=None, clock=clock)
    clock.now = 7200
    budget.count()  # nobody is held
    budget.begin(price=10.0)
    clock.now += 3600
    budget.count()
    budget.begin(price=20.0)  # other machines
    clock.now += 1800
    budget.end()
    assert (budget.hours, budget.cost, budget.reached) == (1.5, 20.0, None)

    again = Budget(tmp_path, max_hours=3, max_cost=30, clock=clock)
    again.begin(price=20.0)
    clock.now += 1800
    again.count()
    assert again.reached == "max_cost is 30, the run has cost 30.00"
    clock.now += 3600
    again.count()
    assert again.reached == "max_hours is 3, the run has had workers for 3.00 hours"


def test_a_killed_driver_forgets_little(tmp_path):
    clock = Clock()
    budget = Budget(tmp_path, max_hours=None, max_cost=None, clock=clock)
    budget.begin(price=None)
    for _ in range(100):
        clock.now += 1
        budget.count()
    kept = Budget(tmp_path, max_hours=None, max_cost=None).hours * 3600
    assert 85 <= kept <= 100


def test_a_cost_that_is_not_known_is_no_limit(tmp_path):
    with pytest.raises(InputError, match="max_cost: not every machine says what it costs; set `price`"):
        Budget(tmp_path, max_hours=None, max_cost=5).begin(price=None)


def test_a_run_saves_stops_and_says_so_and_goes_on_with_a_higher_limit(muster, place):
    long = ("run", "job.yaml", "--inline", "phases.sft.max_steps=100000", "phases.sft.checkpoint.every=50000")
    answer = muster(*long, "max_hours=0.003")
    assert answer.status == 3
    assert (
        "stopped and saved: max_hours is 0.003, the run has had workers for 0.0" in answer.out
    )  # a slow machine needs more
    run = Path("runs/sums")
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    assert {"checkpoint", "limit_reached"} <= {event["event"] for event in events}
    spent = json.loads((run / "spent.json").read_text())
    assert spent["hours"] >= 0.003

    answer = muster(*long, "max_hours=0.003")
    assert answer.status == 2
    assert "raise the limit to resume" in answer.out
    assert muster("resume", "sums", "--inline", "max_hours=0.006").status == 3
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    assert next(event["step"] for event in events if event["event"] == "restored") > 0
    assert json.loads((run / "spent.json").read_text())["hours"] >= 0.006


def test_what_no_limit_can_be_is_told(muster, place):
    answer = muster("check", "job.yaml", "max_hours=-1", "max_cost=much")
    assert answer.status == 2
    assert [line.split(": ")[1] for line in answer.errors] == ["max_hours", "max_cost"]
