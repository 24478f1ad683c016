"""Compiled layers learn as others do and write as others do; a machine that cannot compile says so."""

from __future__ import annotations

import sys

import pytest

from training.config import PPO
from training.engine import compiling
from training.errors import InputError

FP32 = 1e-5
"""Relative difference of a loss: fused operations round otherwise, and eight steps at a high rate let that grow."""


def test_ppo_is_told_to_leave_it_out():
    draft = {"recipe": "ppo", "model": {"path": "m", "compile": True}, "data": {"train": "d"}, "reward": "f:score"}
    with pytest.raises(ValueError, match="PPO does not compile its layers yet; leave it out"):
        PPO.model_validate(draft)


@pytest.mark.parametrize(("device", "named"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_machine_without_a_compiler_says_which(monkeypatch, device, named):
    monkeypatch.setenv(named, "/nowhere/cc")
    assert compiling.lacks(device) == "has no compiler (/nowhere/cc)"
    monkeypatch.delenv(named)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "has no compiler (g" in compiling.lacks(device)


def test_a_python_without_its_headers_says_so(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # some program that is there
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda _: "/nowhere")
    assert compiling.lacks("cpu") == "has no /nowhere/Python.h, which compiled code includes"


def test_a_worker_that_cannot_compile_names_its_machine(monkeypatch):
    monkeypatch.setattr(compiling, "lacks", lambda _: "has no compiler (g++)")
    monkeypatch.setattr(compiling.platform, "node", lambda: "node-3")
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    with pytest.raises(InputError, match=r"^node-3: model.compile: has no compiler \(g\+\+\); install gcc"):
        compiling.compile_layers(nn.Sequential(GradientCheckpointingLayer()), "cpu")


def test_a_model_without_layers_that_are_known_says_so():
    from torch import nn

    with pytest.raises(InputError, match="model.compile: Sequential has no layers to compile"):
        compiling.compile_layers(nn.Sequential(nn.Linear(1, 1)), "cpu")


@pytest.mark.cpu
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("workers", "settings", "model"),
    [
        (1, {"stage": 0}, {}),
        (2, {"stage": 2}, {"gradient_checkpointing": True}),
        (1, {"stage": 1}, {"lora": {"rank": 4}}),
    ],
)
def test_compiled_layers_give_the_same_curve(train, tiny, workers, settings, model):
    def losses(**more):
        whole = {"path": str(tiny / "model"), "dtype": "fp32", **model, **more}
        return train(workers, **settings, model=whole).losses

    assert losses(compile=True) == pytest.approx(losses(), rel=FP32)


@pytest.mark.cpu
@pytest.mark.long
@pytest.mark.timeout(300)
def test_layers_are_compiled_a_few_times_not_once_for_every_length(tiny):
    """Twelve steps of packed rows, none as long as another, and answers to questions, for which nothing is compiled."""
    from tests.support.fork_group import ForkGroup
    from tests.support.training_fixtures import phase_of

    questions = {"data": str(tiny / "eval.jsonl"), "limit": 4, "max_new_tokens": 6}
    model = {"path": str(tiny / "model"), "dtype": "fp32", "compile": True}
    phase = phase_of(tiny, "sft", model=model, eval=questions, eval_every=4, max_steps=12)
    with ForkGroup(1, "tests.support.measured_trainer:MeasuredTrainer", phase, str(tiny / "cache")) as group:
        group.call("setup")[0].result()
        group.call("train", 0, 6)[0].result()
        compiled = group.call("compilations")[0].result()
        group.call("train", 6, 6)[0].result()
        group.call("answer", 60.0, begin=True)[0].result()
        assert 0 < compiled <= 6
        assert group.call("compilations")[0].result() - compiled <= 1
