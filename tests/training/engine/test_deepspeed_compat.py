"""What the engine relies on in DeepSpeed without a promise, in the version that is installed.

That the names hold what they are taken for is tested by tests/training/roles/test_trainer.py and
tests/training/checkpoint/test_resume_anywhere.py, at every stage; here a missing name is named.
"""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

from training.engine import deepspeed_compat

pytestmark = pytest.mark.cpu


def test_with_an_empty_table_of_ops_deepspeed_does_not_probe_for_them(monkeypatch):
    import deepspeed

    deepspeed_compat.disable_compiled_ops()
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("the compiler would run"))
    assert deepspeed.ops.__compatible_ops__ == {}


def test_the_optimizers_have_the_groups_and_partitions_that_are_read():
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    read = {
        BF16_Optimizer: ("bf16_groups", "fp32_groups_flat_partition", "bf16_partitioned_groups"),
        DeepSpeedZeroOptimizer: (
            "bit16_groups", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups",
        ),
        DeepSpeedZeroOptimizer_Stage3: (
            "fp16_groups", "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "fp16_partitioned_groups",
            "unflatten",
        ),
    }  # fmt: skip
    missing = [
        name for owner, names in read.items() for name in names if f"self.{name} =" not in inspect.getsource(owner)
    ]
    assert missing == []
    assert "bf16_groups" not in inspect.getsource(DeepSpeedZeroOptimizer), "the name tells the two classes apart"


def test_a_fragment_has_its_two_addresses_and_takes_the_state_of_its_partition():
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    assert {"hp_fragment_address", "lp_fragment_address"} <= {field.name for field in fields(tensor_fragment)}
    assert {"start", "numel"} == {field.name for field in fields(fragment_address)}
    assert [*inspect.signature(tensor_fragment.set_optim_state_fragment).parameters] == [
        "self", "flat_hp_partition", "optim_fragment",
    ]  # fmt: skip


def test_a_parameter_without_deepspeed_is_whole():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    assert (deepspeed_compat.whole_shape(parameter), deepspeed_compat.is_sharded(parameter)) == ((2, 3), False)
