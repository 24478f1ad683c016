"""Adapters on all linear layers: found by names that nothing else has, and that PEFT takes for linear layers."""

from __future__ import annotations

import pytest

from benchmarks import tiny_models
from training.models.lora_targets import all_linear, body_layers, ends_of


def test_layers_of_one_end_are_found_by_it():
    layers = ["m.0.q_proj", "m.1.q_proj", "m.0.mlp.up"]
    assert ends_of(layers, ["m", "m.0", "m.0.mlp", "lm_head", *layers]) == ["q_proj", "up"]


def test_an_end_that_another_module_has_is_taken_longer():
    """A list of projections numbers them as the list of layers numbers these."""
    layers = ["m.projections.0", "m.projections.1", "m.layers.0.gate"]
    others = ["m", "m.layers", "m.layers.0", "m.layers.1", "m.layers.1.gate", "m.projections"]
    assert ends_of(layers, [*others, *layers]) == ["0.gate", "projections.0", "projections.1"]


def test_a_layer_that_no_end_tells_apart_is_found_by_its_whole_name():
    assert ends_of(["gate"], ["gate", "m.gate"]) == ["gate"]


@pytest.fixture
def tiny_model(tmp_path):
    def build(model_type: str):
        from transformers import AutoModelForCausalLM

        tiny_models.make(model_type, tmp_path)
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    return build


@pytest.mark.cpu
def test_names_that_peft_takes_for_experts_get_no_adapters(tiny_model):
    """This type has layers with and without experts, whose gates have the same names."""
    ends, refused = all_linear(tiny_model("glm4_moe"))
    assert {"q_proj", "o_proj"} <= set(ends)
    assert {"gate_proj", "up_proj", "down_proj"} == set(refused)


@pytest.mark.cpu
def test_layers_that_the_kernel_of_states_reads_get_no_adapters(tiny_model):
    ends, refused = all_linear(tiny_model("mamba2"))
    assert ends == ["in_proj"]
    assert refused == ["out_proj"]


@pytest.mark.cpu
def test_a_router_that_answers_with_more_than_a_product_is_no_linear_layer(tiny_model):
    assert not [name for name in body_layers(tiny_model("phimoe")) if "router" in name]


@pytest.mark.cpu
def test_a_model_whose_body_has_another_name_than_it_says_has_layers_without_its_head(tiny_model):
    layers = body_layers(tiny_model("llama4_text"))
    assert any(name.endswith("q_proj") for name in layers)
    assert "lm_head" not in layers


@pytest.mark.cpu
def test_linear_layers_of_a_models_own_class_get_adapters(tiny_model):
    assert "query_key_value" in all_linear(tiny_model("falcon"))[0]
