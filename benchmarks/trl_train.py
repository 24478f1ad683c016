"""A trainer of TRL's on the rows of a benchmark, for `accelerate launch`. Runs in TRL's own environment, without Muster.

Prints one JSON object a step on rank 0: step, loss, tokens (non-padding, of all ranks), as TRL itself logs them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=("sft", "reward"))
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows-a-device", type=int, required=True)
    parser.add_argument("--accumulate", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--pack", action="store_true")
    return parser.parse_args()


class StepPrinter(TrainerCallback):
    """One JSON object a step, when the step has ended."""

    def __init__(self) -> None:
        self.tokens_before = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        tokens = int(logs.get("num_tokens", 0))
        row = {"step": state.global_step, "loss": float(logs["loss"]), "tokens": tokens - self.tokens_before}
        print(json.dumps(row), flush=True)
        self.tokens_before = tokens


def trainer(args: argparse.Namespace) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(args.out),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.rows_a_device,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "adam_beta2": 0.999,
        "optim": "adamw_torch_fused",
        "max_length": args.max_length,
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "logging_first_step": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": [],
        "dataloader_num_workers": 0,
    }
    weights: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    rows = {
        "train_dataset": load_dataset("json", data_files=str(args.rows), split="train"),
        "processing_class": AutoTokenizer.from_pretrained(args.model),
        "callbacks": [StepPrinter()],
    }
    if args.recipe == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, **weights)
        return RewardTrainer(model=model, args=RewardConfig(**settings), **rows)
    model = AutoModelForCausalLM.from_pretrained(args.model, **weights)
    config = SFTConfig(packing=args.pack, train_sampling_strategy="sequential", **settings)
    return SFTTrainer(model=model, args=config, **rows)


def main() -> None:
    # DeepSpeed would compile an op that only its inference needs: minutes at the first use. Muster leaves it out as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    made = trainer(arguments())
    assert made.is_deepspeed_enabled, "accelerate has started TRL without DeepSpeed"
    made.train()


if __name__ == "__main__":
    main()
