"""TRL's RewardTrainer on the pairs of a benchmark, for `accelerate launch`. Runs in TRL's own environment, without Muster.

Prints one JSON object a step on rank 0: step, loss, tokens, pairs (of all ranks), when the step has ended.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer


class StepPrinter(TrainerCallback):
    """One JSON object a step, when the step has ended."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs is not None and "loss" in logs:
            row = {"step": state.global_step, "loss": float(logs["loss"]), "tokens": 0, "samples": self.pairs}
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    args = parser.parse_args()
    # DeepSpeed would compile an op that only its inference needs: minutes at the first use. Muster leaves it out as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32, num_labels=1, attn_implementation="sdpa"
    )
    config = RewardConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch // args.workers,
        learning_rate=args.rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_beta2=0.999,
        optim="adamw_torch_fused",
        max_length=args.max_length,
        gradient_checkpointing=False,
        bf16=False,
        fp16=False,
        use_cpu=True,
        logging_steps=1,
        logging_first_step=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        dataloader_num_workers=0,
        disable_dropout=True,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=load_dataset("json", data_files=str(args.rows), split="train"),
        processing_class=tokenizer,
        callbacks=[StepPrinter(args.batch)],
    )
    assert trainer.is_deepspeed_enabled, "accelerate has started TRL without DeepSpeed"
    trainer.train()


if __name__ == "__main__":
    main()
