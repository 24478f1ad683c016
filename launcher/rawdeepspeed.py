"""The `deepspeed:` setting: raw DeepSpeed settings from a mapping or a JSON file, refused where Muster owns them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.explain import listed, shown
from launcher.yamlfile import KeyPath, dotted, paths

OWNED: dict[str, tuple[str, ...]] = {
    "train_batch_size": ("batch",),
    "train_micro_batch_size_per_gpu": ("micro_tokens", "micro_batch"),
    "gradient_accumulation_steps": ("micro_tokens", "micro_batch"),
    "gradient_clipping": ("clip",),
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


def read(file: Path) -> tuple[dict[str, Any], str]:
    """The settings in a JSON file, and what is wrong with the file (empty if nothing is)."""
    try:
        settings = json.loads(file.read_bytes())
    except OSError as error:
        return {}, f"{file} cannot be read: {(error.strerror or str(error)).lower()}"
    except UnicodeDecodeError:
        return {}, f"{file} is not UTF-8 text"
    except json.JSONDecodeError as error:
        return {}, f"{file}:{error.lineno}: not valid JSON: {error.msg}"
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
