"""A trainer of TRL's on the rows of a benchmark, for `accelerate launch`.
Prints one JSON object a step: step, loss, tokens."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.peer_script import StepPrinter, arguments, leave_shared_memory_op_out


def trainer(args: Namespace) -> Any:
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
        "peft_config": LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
        if args.lora
        else None,
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
    leave_shared_memory_op_out()
    made = trainer(arguments())
    assert made.is_deepspeed_enabled, "accelerate has started TRL without DeepSpeed"
    made.train()


if __name__ == "__main__":
    main()
