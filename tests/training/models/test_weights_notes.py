"""What a user is told of weights that a model does not use."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.training_fixtures import phase_of

pytestmark = pytest.mark.cpu


def test_weights_and_losses_without_effect_are_named(tiny, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from training.models.loading import load, notes_on_weights

    shutil.copytree(tiny / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.vision.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    phase = phase_of(tiny, "sft")
    assert notes_on_weights(load(phase, torch.float32, "cpu")) == []
    phase = phase_of(tiny, "sft", model={"path": str(tmp_path / "model"), "dtype": "fp32"})
    (unused,) = notes_on_weights(load(phase, torch.float32, "cpu"))
    assert unused == "of the weights model.layers.0.vision.weight are not used: the model has no such parameters"

    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(
        json.dumps({**config, "output_router_logits": True, "router_aux_loss_coef": 0.01})
    )
    _, router = notes_on_weights(load(phase, torch.float32, "cpu"))
    assert router.startswith("the loss is that of the tokens alone: router_aux_loss_coef 0.01")
