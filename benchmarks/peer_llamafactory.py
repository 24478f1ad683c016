"""LLaMA-Factory's SFT on the rows of a benchmark, for torchrun. Prints one JSON object a step: step, loss, tokens."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peer_script import StepPrinter, arguments, leave_shared_memory_op_out


def settings(args: Namespace) -> dict[str, Any]:
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if args.lora else "full",
        "lora_rank": args.lora or 8,
        "model_name_or_path": str(args.model),
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "dataset": "rows",
        "dataset_dir": str(described(args)),
        "template": "bare",
        "cutoff_len": args.max_length,
        "packing": args.pack,
        "neat_packing": args.pack,
        "disable_shuffling": True,
        "output_dir": str(args.out),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.rows_a_device,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "deepspeed": str(args.zero),
        "use_cpu": True,
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
    }


def described(args: Namespace) -> Path:
    """A folder of this process with the description of the rows that LLaMA-Factory asks for."""
    folder: Path = args.out / f"rank-{os.environ['RANK']}"
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": "prompt", "response": "completion"}
    description = {"rows": {"file_name": str(args.rows), "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(description))
    return folder


def do_without_audio() -> None:
    """LLaMA-Factory imports torchaudio whatever it trains on, and the registry's needs CUDA's libraries."""
    name = "torchaudio"
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__spec__ = ModuleSpec(name, None)


def main() -> None:
    args = arguments()
    do_without_audio()
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    leave_shared_memory_op_out()
    register_template("bare")  # its "empty" leaves the end token out
    run_exp(settings(args), callbacks=[StepPrinter()])


if __name__ == "__main__":
    main()
