"""Activations are recomputed where a job says so; where it leaves that open, on GPUs that they would not fit into."""

from __future__ import annotations

import pytest

from tests.support.training_fixtures import phase_of
from training.config import PPO
from training.estimate.memory import models_of, recomputes, setting_of, team
from training.estimate.parameters import shape_of

GIB = 1 << 30


def llama(recipe="sft", *, workers=8, checkpointing="auto", lora=None, **settings):
    from training.recipes import RECIPES

    model = {"path": "meta-llama/Llama-2-7b-hf", "gradient_checkpointing": checkpointing, "lora": lora}
    draft = {"recipe": recipe, "model": model, "data": {"train": "-"}, "resources": {"workers": workers}, **settings}
    return RECIPES[recipe].config.model_validate(draft)


def decided(phase, gib, on_gpu=True, roles=()):
    where = setting_of(phase, dtype="bf16", on_gpu=on_gpu)
    return recomputes(phase, roles, models_of(phase, shape_of), where, gib * GIB)


def test_where_it_is_left_open_the_gpu_decides():
    assert [decided(llama(), gib) for gib in (40, 80)] == [True, False]


def test_what_the_job_says_is_done():
    assert [decided(llama(checkpointing=said), gib) for said in (True, False) for gib in (40, 80)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_without_a_gpu_activations_are_kept():
    assert not decided(llama(), 1, on_gpu=False)


def test_a_step_is_left_room_for_what_the_formulas_do_not_know():
    phase = llama()
    kept = setting_of(phase, dtype="bf16", on_gpu=True)
    needs = sum(team(phase, (), models_of(phase, shape_of), kept).device.values()) / GIB
    assert decided(phase, needs * 1.1)
    assert not decided(phase, needs * 1.2)


def test_roles_that_share_a_gpu_decide_together_and_those_that_only_answer_never():
    ppo = llama("ppo", reward="tests.support.some_rewards:nines", batch=64, response_tokens=512)
    assert isinstance(ppo, PPO)
    one, both = (decided(ppo, 70, roles=roles) for roles in (("policy",), ("policy", "reference", "critic")))
    assert (one, both) == (False, True)
    assert not decided(ppo, 1, roles=("rollout",))


@pytest.mark.parametrize(("gib", "workers"), [(40, 8), (60, 8), (60, 1), (80, 1), (200, 1)])
@pytest.mark.parametrize("recipe", ["sft", "reward"])
def test_workers_decide_as_the_plan_does(recipe, gib, workers):
    import torch

    from training.roles.learner import recomputes_on

    phase = llama(recipe, workers=workers)
    assert recomputes_on(phase, "trainer", workers, torch.bfloat16, gib * GIB) == decided(phase, gib)


def test_fewer_workers_than_the_job_asks_for_decide_for_themselves():
    """ZeRO gives each of them more to hold."""
    import torch

    from training.roles.learner import recomputes_on

    phase = llama(workers=16, sharding={"stage": 3})
    found = [recomputes_on(phase, "trainer", workers, torch.bfloat16, 48 * GIB) for workers in (16, 4)]
    assert found == [False, True]


def test_a_model_of_which_nothing_is_known_recomputes():
    import torch

    from training.roles.learner import recomputes_on, with_recomputing

    phase = llama()
    nowhere = phase.model_copy(update={"model": phase.model.model_copy(update={"path": "/nowhere"})})
    assert recomputes_on(nowhere, "trainer", 8, torch.bfloat16, 80 * GIB)
    assert with_recomputing(phase, True).model.gradient_checkpointing is True


@pytest.mark.cpu
@pytest.mark.parametrize(("said", "done"), [("auto", False), (False, False), (True, True)])
def test_what_was_decided_is_a_fact_and_holds_for_the_model(tiny, said, done):
    from tests.support.fork_group import ForkGroup

    model = {"path": str(tiny / "model"), "dtype": "fp32", "gradient_checkpointing": said}
    phase = phase_of(tiny, "sft", model=model)
    with ForkGroup(1, "tests.support.measured_trainer:MeasuredTrainer", phase, str(tiny / "cache")) as group:
        assert group.call("setup")[0].result().recomputes is done
        assert group.call("layers_that_recompute")[0].result() == [done, done]
