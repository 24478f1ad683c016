"""Which kernels a model gets. Liger's need a GPU, so what they compute is tested in
tests/gpu/test_kernels_on_gpu.py."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from training.config import Model
from training.errors import InputError
from training.models import kernels


@pytest.fixture
def machine(monkeypatch):
    """machine(package, compiler) pretends that they are there, or not."""

    def pretend(package: bool = True, compiler: bool = True) -> None:
        monkeypatch.setattr(kernels, "find_spec", lambda name: object() if package else None)
        monkeypatch.setattr(kernels.compiling, "lacks", lambda device: "" if compiler else "has no compiler (gcc)")
        monkeypatch.setattr(kernels, "_known_types", lambda: {"llama", "qwen2"})

    pretend()
    return pretend


def resolved(device="cuda", model_type="llama", **settings):
    return kernels.resolve(Model(path="m", **settings), device, lambda: model_type)


def test_ligers_are_taken_where_they_can_be(machine):
    assert resolved() == "liger"
    assert resolved(kernels="liger") == "liger"


def test_torchs_are_taken_where_ligers_cannot_be_had_or_are_of_no_use(machine):
    assert resolved(kernels="torch") == "torch"
    assert resolved(device="cpu") == "torch"
    assert resolved(model_type="mamba") == "torch"
    assert resolved(compile=True) == "torch"
    machine(package=False)
    assert resolved() == "torch"
    machine(compiler=False)
    assert resolved() == "torch"


@pytest.mark.parametrize(
    ("there", "how", "told"),
    [
        ({}, {"device": "cpu"}, "need a GPU"),
        ({"package": False}, {}, "need the package liger-kernel; pip install liger-kernel"),
        ({"compiler": False}, {}, "this machine has no compiler"),
        ({}, {"model_type": "mamba"}, "no kernels for models of type mamba"),
    ],
)
def test_those_that_are_asked_for_and_cannot_be_had_are_an_error(machine, there, how, told):
    machine(**there)
    with pytest.raises(InputError, match=f"^m: model.kernels: .*{told}"):
        resolved(kernels="liger", **how)


def test_a_model_gets_them_all_but_the_loss(monkeypatch):
    """By transformers' own integration, which hands them to the package."""
    asked = {}
    package = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda **settings: asked.update(settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations import liger

    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape))
    kernels.fuse(lm)
    assert asked.pop("model") is lm
    assert {name for name, wanted in asked.items() if wanted} == {"rope", "rms_norm", "layer_norm", "swiglu", "geglu"}
    assert {name for name, wanted in asked.items() if not wanted} == {"cross_entropy", "fused_linear_cross_entropy"}
