"""What recipes measure is what the table of metrics says."""

from __future__ import annotations

import pytest

from training.config import CFT, Reward
from training.metric_schema import ALIASES, with_current_names, with_old_names
from training.recipes import RECIPES, metric

pytestmark = pytest.mark.cpu


def questions(tiny):
    return {"data": str(tiny / "eval.jsonl"), "limit": 2, "max_new_tokens": 3, "samples": 2, "temperature": 1.0}


def settings(tiny, recipe):
    """Of a run of two steps that measures all that its recipe can."""
    held_out = {"data": {"eval": str(tiny / f"{recipe}.eval.jsonl".removeprefix("sft."))}}
    verdicts = {"verdicts": str(tiny / "cft.eval.jsonl")}
    own = {
        "pretrain": {**held_out, "eval": questions(tiny)},
        "sft": {**held_out, "eval": questions(tiny)},
        "cft": {**held_out, "eval": {**questions(tiny), **verdicts}},
        "reward": held_out,
        "ppo": {
            "reward": "tests.support.some_rewards:nines",
            "critic": str(tiny / "model"),
            "rollout_batch": 16,
            "response_tokens": 4,
            "data": {"max_length": 64},
            "eval": {**questions(tiny), **verdicts},
            "groups": [
                {"roles": ["policy", "reference", "critic", "reward"], "workers": 1},
                {"roles": ["rollout"], "workers": 1},
            ],
            "async": 1,
        },
    }
    return {"recipe": recipe, "max_steps": 2, **own[recipe]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_measures_nothing_that_the_table_does_not_know_and_all_that_it_does(tiny, train, recipe):
    hooks = train(1, **settings(tiny, recipe), **({} if recipe == "ppo" else {"skipped": frozenset({1})}))
    names = {name for row in hooks.rows for name in row}
    assert sorted(name for name in names if metric(recipe, name) is None) == []
    told = {name.replace("pass@2", "pass@K") for name in names} | {"attempt"}
    verdicts = set() if recipe in ("cft", "ppo") else {name for name in RECIPES[recipe].metrics if "verdict" in name}
    assert sorted(RECIPES[recipe].metrics.keys() - told - verdicts) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_metric_has_a_label_and_a_meaning(recipe):
    assert all(each.label and each.meaning.endswith(".") for each in RECIPES[recipe].metrics.values())


def test_what_a_best_checkpoint_may_be_chosen_by_is_in_the_table():
    draft = {"model": {"path": "m"}, "data": {"train": "d", "eval": "e"}}
    assert metric("reward", Reward(recipe="reward", **draft).eval_metrics()[0])
    assert all(metric("cft", name) for name in CFT(recipe="cft", **draft).eval_metrics())
    assert metric("sft", "eval_pass@16") == metric("sft", "eval_pass@K")
    assert metric("sft", "reward") is None


def test_a_renamed_metric_is_written_under_both_names_and_read_under_the_current_one():
    for old, name in ALIASES.items():
        assert any(metric(recipe, name) for recipe in RECIPES)
        assert not any(metric(recipe, old) for recipe in RECIPES)
    row = {"step": 3, "eos_rate": 0.5, "loss": 1.0}
    assert with_old_names(row) == {**row, "ended": 0.5}
    assert with_old_names({"rows": [row]}) == {"rows": [{**row, "ended": 0.5}]}
    assert with_current_names(with_old_names(row)) == row
    assert with_current_names({"step": 3, "ended": 0.5, "loss": 1.0}) == row
