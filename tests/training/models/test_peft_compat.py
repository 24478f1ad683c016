"""What LoRA relies on in PEFT without a promise, in the version that is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from training.models.peft_compat import refuses_layer

pytestmark = pytest.mark.cpu


class Model(nn.Module):
    def __init__(self, model_type: str):
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)


def test_peft_refuses_layers_that_a_model_with_states_reads_past_the_adapter():
    assert refuses_layer(Model("mamba"), "mixer.out_proj")
    assert not refuses_layer(Model("mamba"), "mixer.in_proj")
    assert not refuses_layer(Model("llama"), "self_attn.out_proj")
