"""The `deepspeed:` setting: raw DeepSpeed settings from a mapping or a JSON file, refused where Muster owns them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.jobfile.other_tools import name_here
from launcher.jobfile.validation_messages import did_you_mean, listed, shown
from launcher.jobfile.yaml_with_lines import KeyPath, dotted, paths
from training.io.foreign_files import loads

OWNED: dict[str, tuple[str, ...]] = {
    "train_batch_size": ("batch",),
    "train_micro_batch_size_per_gpu": ("micro_tokens", "micro_batch"),
    "gradient_accumulation_steps": ("micro_tokens", "micro_batch"),
    "gradient_clipping": ("clip",),
    "gradient_allreduce_op": ("batch",),
    "optimizer": ("optimizer", "learning_rate"),
    "scheduler": ("schedule",),
    "bf16": ("model.dtype",),
    "bfloat16": ("model.dtype",),
    "fp16": ("model.dtype",),
    "amp": ("model.dtype",),
    "data_types": ("model.dtype",),
    "torch_autocast": ("model.dtype",),
    "zero_optimization.stage": ("sharding.stage",),
    "zero_optimization.cpu_offload": ("sharding.offload",),
    "zero_optimization.offload_optimizer.device": ("sharding.offload",),
    "zero_optimization.offload_param.device": ("sharding.offload",),
    "activation_checkpointing": ("model.gradient_checkpointing",),
    "checkpoint": ("checkpoint",),
    "elasticity": ("batch", "resources"),
    "steps_per_print": ("log_every",),
    "tensorboard": ("track",),
    "wandb": ("track",),
    "comet": ("track",),
    "csv_monitor": ("track",),
}
"""What Muster owns of DeepSpeed's settings, and the settings of a job to use instead."""

KNOWN: frozenset[str] = frozenset(OWNED) | {
    "aio", "autotuning", "comms_logger", "communication_data_type", "compile", "compression_training",
    "curriculum_learning", "data_efficiency", "data_parallel_size", "dataloader_drop_last", "datastates_ckpt",
    "ddp_bf16", "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "expert_parallel",
    "flops_profiler", "graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "nebula", "pipeline", "prescale_gradients", "gradient_predivide_factor",
    "progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "sparse_attention", "sparse_gradients", "tensor_parallel", "timers", "use_data_before_expert_parallelism",
    "vocabulary_size", "wall_clock_breakdown", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
"""DeepSpeed's settings (0.19). Others it does not read."""

KNOWN_ZERO: frozenset[str] = frozenset({
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm",
    "contiguous_gradients", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "leaf_module",
    "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings", "max_live_parameters", "max_reuse_distance",
    "memory_efficient_linear", "mics_hierarchical_params_gather", "mics_shard_size", "model_persistence_threshold",
    "module_granularity_threshold", "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "param_persistence_threshold", "parameter_alignment", "pipeline_loading_checkpoint", "prefetch_bucket_size",
    "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})  # fmt: skip
"""The same inside zero_optimization, where DeepSpeed refuses others."""


def unknown(settings: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that DeepSpeed does not have, and the name to use instead."""
    zero = settings.get("zero_optimization")
    for path, keys, known in (
        ((), settings, KNOWN),
        (("zero_optimization",), zero if isinstance(zero, dict) else {}, KNOWN_ZERO),
    ):
        for key in keys:
            if key not in known:
                here = name_here(str(key))
                meant = f"; {here}" if here else did_you_mean(str(key), known)
                yield (*path, key), f"DeepSpeed has no such setting{meant}"


def read(file: Path) -> tuple[dict[str, Any], str]:
    """The settings in a JSON file, and what is wrong with the file (empty if nothing is)."""
    try:
        settings = loads(file.read_bytes())
    except OSError as error:
        return {}, f"{file} cannot be read: {(error.strerror or str(error)).lower()}"
    except UnicodeDecodeError:
        return {}, f"{file} is not UTF-8 text"
    except json.JSONDecodeError as error:
        return {}, f"{file}:{error.lineno}: not valid JSON: {error.msg}"
    except ValueError as error:
        return {}, f"{file}: not valid JSON: {error}"
    if not isinstance(settings, dict):
        return {}, f"{file}: expected a JSON object of DeepSpeed settings, got {shown(settings)}"
    return settings, ""


def clashes(settings: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Where raw settings take what is not theirs, and what to do instead."""
    for path, value in paths(settings):
        if instead := OWNED.get(dotted(path)):
            yield path, f"Muster sets this itself; remove it and use {listed(instead)}"
        elif value == "auto" and not any(dotted(path[:depth]) in OWNED for depth in range(len(path))):
            yield path, '"auto" is filled in by the Hugging Face Trainer alone; remove the key or give a value'
