"""Buffers that are stored with the weights: found by the model's class, under whatever names the files have."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import tiny_models
from training.config import Model
from training.models.layout import buffers

pytestmark = pytest.mark.cpu


def test_a_routers_biases_are_buffers_of_a_mixture_of_experts(tmp_path):
    tiny_models.make("glm4_moe", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = dict(buffers(Model(path=str(tmp_path))))
    assert found
    assert all(name.endswith("e_score_correction_bias") for name in found)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())


def test_a_model_with_weights_alone_has_none(tmp_path):
    tiny_models.make("llama", tmp_path)
    assert dict(buffers(Model(path=str(tmp_path)))) == {}


def test_buffers_under_other_names_are_those_of_the_loaded_model(tmp_path):
    """As transformers reads the files of this type: it renames their tensors."""
    tiny_models.make("exaone_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        name.replace("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"): each
        for name, each in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    found = dict(buffers(Model(path=str(tmp_path))))
    assert found
    assert all(".gate.e_score_correction_bias" in name for name in found)
