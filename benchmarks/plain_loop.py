"""The hand-written loop that Muster is measured against: torchrun, DeepSpeed, one file. Knows nothing of launcher/.

    torchrun --standalone --nproc-per-node 2 benchmarks/plain_loop.py MODEL ROWS --steps 20 --batch 16 --stage 2

It reads and tokenizes the rows by itself, in the file's order. A batch is laid out in one of two ways:
    padded   as such a loop is written by hand: every other sample, padded to the longest, logits for every place
    dealt    exactly as Muster lays it out (its dealing, its collation, its loss), so that only the machinery differs
Rank 0 prints one JSON object a step. The loss is that of the whole global batch. With --checkpoints FOLDER it loads
what lies there, saves every --save-every steps with DeepSpeed's own calls, and prints how long all ranks took for each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100
Sample = tuple[np.ndarray, np.ndarray]
"""Token ids [T] and whether each is learnt [T]."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--layout", choices=("padded", "dealt"), required=True)
    parser.add_argument("--rows-a-device", type=int, default=8, help="in a micro-batch (padded)")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0: never")
    parser.add_argument("--no-pack", dest="pack", action="store_false", help="one sample in a row (dealt)")
    return parser.parse_args()


def read_samples(path: Path, tokenizer: Any, max_length: int) -> list[Sample]:
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    completions = tokenizer([row["completion"] for row in rows]).input_ids
    samples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = np.array([*prompt, *completion, tokenizer.eos_token_id])
        if len(ids) <= max_length:
            samples.append((ids, np.arange(len(ids)) >= len(prompt)))
    return samples


def padded(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Samples as rows, each as long as the longest. All [B, T]."""
    shape = (len(samples), max(len(ids) for ids, _ in samples))
    input_ids, mask, labels = np.zeros(shape, int), np.zeros(shape, int), np.full(shape, IGNORED)
    for row, (ids, learnt) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = np.where(learnt, ids, IGNORED)
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PaddedBatches:
    """Every other sample, so many rows in a micro-batch, and the model's own loss."""

    def __init__(self, args: argparse.Namespace, samples: list[Sample]):
        self.rows = args.rows_a_device
        self.lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
        self.module = self.lm

    def micro_batches(self, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        mine = samples[dist.get_rank() :: dist.get_world_size()]
        for first in range(0, len(mine), self.rows):
            yield padded(mine[first : first + self.rows])

    def loss_sum(self, engine: Any, micro: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = engine(**micro, use_cache=False, num_items_in_batch=torch.tensor(1)).loss
        return loss


class DealtBatches:
    """Muster's layout, attention and loss."""

    def __init__(self, args: argparse.Namespace, samples: list[Sample]):
        from training.config import SFT
        from training.data.batching import SDPA_VARLEN, limits_for
        from training.models import attention
        from training.models.loading import TokenLoss

        attention.register()
        lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=SDPA_VARLEN)
        lm.train()
        self.module = TokenLoss(lm)
        data = {"train": str(args.rows), "max_length": args.max_length, "pack": args.pack}
        phase = SFT.model_validate({"recipe": "sft", "model": {"path": str(args.model)}, "data": data})
        self.limits = limits_for(phase, max(len(ids) for ids, _ in samples), "cpu", SDPA_VARLEN)

    def micro_batches(self, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        from training.data.batching import partition_batch
        from training.data.collate import collate

        lengths = [len(ids) for ids, _ in samples]
        for rows in partition_batch(lengths, dist.get_world_size(), self.limits)[dist.get_rank()]:
            yield collate([[samples[i] for i in row] for row in rows])

    def loss_sum(self, engine: Any, micro: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = engine(**micro)[0]
        return loss


def start_engine(module: torch.nn.Module, args: argparse.Namespace) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.rate, weight_decay=0.0, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def train_step(engine: Any, batches: Any, samples: list[Sample]) -> torch.Tensor:
    """The loss of this rank's share, summed over its targets. []"""
    targets = sum(int(learnt.sum()) for _, learnt in samples)
    micros = list(batches.micro_batches(samples))
    total = torch.zeros(())
    for number, micro in enumerate(micros, 1):
        engine.set_gradient_accumulation_boundary(number == len(micros))
        loss = batches.loss_sum(engine, micro)
        engine.backward(loss * (dist.get_world_size() / targets))
        total += loss.detach()
    engine.step()
    return total


def timed(what: str, call: Callable[[], object]) -> None:
    """Print the seconds until all ranks have done it."""
    dist.barrier()
    began = time.perf_counter()
    call()
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps({what: time.perf_counter() - began}), flush=True)


def main() -> None:
    args = arguments()
    # DeepSpeed would compile an op that only its inference needs: minutes at the first use.
    # Muster leaves it out as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    samples = read_samples(args.rows, AutoTokenizer.from_pretrained(args.model), args.max_length)
    batches: Any = (PaddedBatches if args.layout == "padded" else DealtBatches)(args, samples)
    engine = start_engine(batches.module, args)
    if args.checkpoints and args.checkpoints.exists():
        timed("load_s", lambda: engine.load_checkpoint(str(args.checkpoints)))
    for step in range(1, args.steps + 1):
        began = time.perf_counter()
        batch = [samples[i % len(samples)] for i in range((step - 1) * args.batch, step * args.batch)]
        loss = train_step(engine, batches, batch)
        seconds = time.perf_counter() - began
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            targets = sum(int(learnt.sum()) for _, learnt in batch)
            row = {
                "step": step,
                "loss": loss.item() / targets,
                "step_s": seconds,
                "tokens": sum(len(i) for i, _ in batch),
            }
            print(json.dumps(row), flush=True)
        if args.checkpoints and args.save_every and step % args.save_every == 0:
            timed("save_s", lambda: engine.save_checkpoint(str(args.checkpoints)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
