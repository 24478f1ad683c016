"""What the engine uses of DeepSpeed that DeepSpeed does not promise: the state of its ZeRO optimizers, and one switch.

tests/training/engine/test_deepspeed_compat.py says what each function relies on. Loads DeepSpeed late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def disable_compiled_ops() -> None:
    """Make DeepSpeed use no op that it would compile.

    DeepSpeed compiles a CPU op at first use, which takes minutes without output, and waits forever on the lock of a
    killed compilation. Only its inference collectives need the op. Its table of usable ops is the switch; if it is set
    and empty, DeepSpeed does not probe for ops either, which would run the compiler.

    Private: `deepspeed.ops.__compatible_ops__`.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def is_sharded(parameter: Any) -> bool:
    """Return whether ZeRO-3 has sharded a parameter. Private: `ds_id`."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, also of one that ZeRO-3 has sharded, whose tensor is an empty placeholder.

    Private: `ds_shape`.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Slice:
    """The part of a parameter that lies in this worker's flat partition. Numbers of elements."""

    flat_start: int
    start: int
    """In the flattened parameter."""
    count: int


def partitions(zero: Any) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield the parameters of each group and this worker's flat fp32 partition of them, under ZeRO-1 and 2.

    Private: `bf16_groups` and `fp32_groups_flat_partition` of `BF16_Optimizer`, which ZeRO-1 in bf16 has;
    `bit16_groups` and `single_partition_of_fp32_groups` of `DeepSpeedZeroOptimizer`.
    """
    if hasattr(zero, "bf16_groups"):
        yield from zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True)
    else:
        yield from zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)


def weight_partitions(zero: Any) -> list[list[Tensor]]:
    """Return for each group the weights to compute with, divided as the workers' partitions are; views, under ZeRO-1
    and 2.

    Private: `bf16_partitioned_groups` of `BF16_Optimizer`, `parallel_partitioned_bit16_groups` of
    `DeepSpeedZeroOptimizer`.
    """
    name = "bf16_partitioned_groups" if hasattr(zero, "bf16_groups") else "parallel_partitioned_bit16_groups"
    found: list[list[Tensor]] = getattr(zero, name)
    return found


def slice_in_partition(parameter: Any) -> Slice | None:
    """Return where a parameter lies in this worker's partition, under ZeRO-1 and 2; None if no part of it does.

    Private: `_hp_mapping`, with the addresses of the fragment in the partition and in the parameter.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Slice(here.start, there.start, there.numel)


def renew_state_views(parameter: Any, flat: Tensor, state: dict[str, Any]) -> None:
    """Make DeepSpeed's own views of a parameter's optimizer state show the state of its partition.

    Private: `_hp_mapping.set_optim_state_fragment`.
    """
    if parameter._hp_mapping is not None:
        parameter._hp_mapping.set_optim_state_fragment(flat, state)


def sharded_partitions(zero: Any) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield the parameters of each group and this worker's flat fp32 shard of all of them, under ZeRO-3.

    Private: `fp16_groups` and `fp32_partitioned_groups_flat` of `DeepSpeedZeroOptimizer_Stage3`.
    """
    yield from zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)


def shard_length(parameter: Any) -> tuple[int, int]:
    """Return the elements of each worker's shard of a parameter, the last one padded, and of the parameter itself,
    under ZeRO-3. Private: `ds_tensor.ds_numel`, `ds_numel`."""
    return parameter.ds_tensor.ds_numel, parameter.ds_numel


@torch.no_grad()
def publish_shards(zero: Any) -> None:
    """Copy this worker's fp32 shards into the shards that the model computes with, under ZeRO-3.

    Private: `fp32_partitioned_groups_flat`, `fp16_partitioned_groups_flat`, `fp16_partitioned_groups` and `unflatten`
    of `DeepSpeedZeroOptimizer_Stage3`.
    """
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        whole, parts = zero.fp16_partitioned_groups_flat[number], zero.fp16_partitioned_groups[number]
        whole.data.copy_(flat.data)
        for part, value in zip(parts, zero.unflatten(whole, parts), strict=True):
            part.data = value.data
