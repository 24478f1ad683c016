"""What is set for DeepSpeed, by device; and that sending gradients beside the backward pass does not change them."""

from __future__ import annotations

import pytest

from tests.support.training_fixtures import sft_phase


@pytest.mark.parametrize(
    ("device", "size", "stage", "offload", "overlaps"),
    [
        ("cuda", 2, 2, "none", True),
        ("cuda", 1, 2, "none", None),  # nobody to send to
        ("cuda", 2, 2, "cpu", None),
        ("cuda", 2, 1, "none", None),
        ("cuda", 2, 3, "none", None),  # where DeepSpeed does it by itself
        ("cpu", 2, 2, "none", None),
    ],
)
def test_gradients_are_sent_beside_the_backward_pass_where_a_device_can(tiny, device, size, stage, offload, overlaps):
    import torch

    from training.engine.engine import derive_config
    from training.process.distributed import RankInfo

    phase = sft_phase(tiny, sharding={"stage": stage, "offload": offload})
    zero = derive_config(phase, RankInfo(rank=0, size=size, device=device), torch.bfloat16)["zero_optimization"]
    assert zero.get("overlap_comm") is overlaps


def test_what_the_job_says_of_deepspeed_lies_over_it(tiny):
    import torch

    from training.engine.engine import derive_config
    from training.process.distributed import RankInfo

    phase = sft_phase(tiny, stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}})
    zero = derive_config(phase, RankInfo(rank=0, size=2, device="cuda"), torch.float32)["zero_optimization"]
    assert zero == {"stage": 2, "overlap_comm": False}


def test_buckets_are_no_larger_than_what_is_trained_and_smaller_on_a_cpu():
    from training.estimate.memory import bucket_numbers

    assert bucket_numbers(1000, "cuda") == bucket_numbers(1000, "cpu") == 1000
    assert bucket_numbers(10**10, "cpu") < bucket_numbers(10**10, "cuda")


@pytest.mark.cpu
def test_two_buckets_that_take_turns_give_the_same_curve(train):
    """Buckets so small that several are sent in every backward pass."""
    zero = {"overlap_comm": True, "reduce_bucket_size": 20_000}
    overlapping = train(2, stage=2, deepspeed={"zero_optimization": zero}, micro_batch=2)
    assert overlapping.losses == pytest.approx(train(2, stage=2, micro_batch=2).losses, rel=1e-6)


def test_a_plan_counts_both_buckets():
    from training.config import Sharding
    from training.estimate.memory import Setting, learning
    from training.estimate.parameters import shape_of

    shape = shape_of("meta-llama/Llama-2-7b-hf")
    told = {
        (on_gpu, workers): learning(
            shape,
            Setting(
                workers=workers, sharding=Sharding(stage=2), dtype="bf16", on_gpu=on_gpu, row_tokens=8, micro_tokens=8
            ),
            "language",
        )["gradient bucket"]
        for on_gpu, workers in ((True, 2), (True, 1), (False, 2))
    }
    assert told == {(True, 2): 2 * 2 * 200_000_000, (True, 1): 2 * 200_000_000, (False, 2): 2 * 4_000_000}
