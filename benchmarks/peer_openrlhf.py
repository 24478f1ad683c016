"""OpenRLHF's SFT on the rows of a benchmark, for torchrun. Prints one JSON object a step: step, loss, tokens.

OpenRLHF is made for GPUs; what it takes for granted of them is put right here (`on_a_cpu`), its training is its own.
"""

from __future__ import annotations

import json
import runpy
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from benchmarks.peer_script import arguments, leave_shared_memory_op_out, print_step


def command_line(args: Namespace) -> list[str]:
    batch = args.rows_a_device * args.accumulate * args.processes
    settings = {
        "model.model_name_or_path": args.model,
        "data.dataset": args.rows,
        "data.input_key": "prompt",
        "data.output_key": "completion",
        "data.input_template": "{}",
        "data.max_len": args.max_length,
        "data.max_samples": args.steps * batch,
        "train.batch_size": batch,
        "train.micro_batch_size": args.rows_a_device,
        "train.max_epochs": 1,
        "ds.zero_stage": json.loads(args.zero.read_text())["zero_optimization"]["stage"],
        "ds.attn_implementation": "sdpa",
        "ds.lora.rank": args.lora,
        "adam.lr": args.rate,
        "lr_scheduler": "constant",
        "lr_warmup_ratio": 0,
        "max_norm": 1.0,
        "ckpt.output_dir": args.out,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*words, "--adam.betas", "0.9", "0.999"]


def do_without_ring_attention() -> None:
    """That file of OpenRLHF's imports flash-attn, which needs a GPU; nothing is called of it here."""
    ring: Any = ModuleType("openrlhf.models.ring_attn_utils")
    ring.get_ring_attn_group = lambda: None
    ring.set_ring_attn_group = ring.gather_and_pad_tensor = ring.unpad_and_slice_tensor = None
    sys.modules[ring.__name__] = ring


def on_a_cpu() -> None:
    """fp32, gloo, torch's fused AdamW instead of an op to be compiled, the file's order."""
    cuda: Any = torch.cuda
    cuda.set_device = cuda.synchronize = lambda *_: None
    cuda.current_device = lambda: "cpu"
    import_module("openrlhf.utils.utils").convert_to_torch_dtype = lambda _: torch.float32
    strategy = import_module("openrlhf.utils.deepspeed.deepspeed")
    mesh, config, loader = strategy.init_device_mesh, strategy.get_train_ds_config, strategy.StatefulDataLoader
    sampler = strategy.DistributedSampler

    def fp32(**settings: Any) -> dict[str, Any]:
        made: dict[str, Any] = config(**settings) | {"bf16": {"enabled": False}, "zero_force_ds_cpu_optimizer": False}
        if "optimizer" in made:
            made["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
        return made

    strategy.init_device_mesh = lambda _, *shape, **names: mesh("cpu", *shape, **names)
    strategy.get_train_ds_config = fp32
    strategy.StatefulDataLoader = lambda *rows, **how: loader(*rows, **how | {"pin_memory": False})
    strategy.DistributedSampler = lambda *rows, **how: sampler(*rows, **how | {"shuffle": False})


def end_completions(args: Namespace) -> None:
    """OpenRLHF would write a space before the end token."""
    module = import_module("openrlhf.datasets.sft_dataset")
    read, end = module.preprocess_data, AutoTokenizer.from_pretrained(args.model).eos_token

    def ended(*row: Any, **how: Any) -> tuple[str, str]:
        prompt, completion = read(*row, **how)
        return prompt, completion + end

    module.preprocess_data = ended


def report_steps() -> None:
    """Print the loss and the tokens of the global batch. What OpenRLHF logs as loss_mean is one process's share."""
    module = import_module("openrlhf.trainer.sft_trainer")
    windows, tokens = module.iter_grad_accum_global_norm, torch.zeros(())

    def counted(window: Any, *rest: Any) -> Iterator[Any]:
        tokens.fill_(sum(int(mask.sum()) for _, mask, _ in window))
        counted_windows: Iterator[Any] = windows(window, *rest)
        return counted_windows

    def report(trainer: Any, args: Any, step: int, bar: Any, logs: dict[str, float], *rest: Any) -> None:
        totals = torch.stack([torch.tensor(logs["loss_mean"] / dist.get_world_size()), tokens])
        dist.all_reduce(totals)
        if dist.get_rank() == 0:
            print_step(step, totals[0].item(), int(totals[1]))

    module.iter_grad_accum_global_norm = counted
    module.SFTTrainer.save_logs_and_checkpoints = report


def main() -> None:
    args = arguments()
    leave_shared_memory_op_out()
    do_without_ring_attention()
    on_a_cpu()
    end_completions(args)
    report_steps()
    sys.argv[1:] = command_line(args)
    runpy.run_module("openrlhf.cli.train_sft", run_name="__main__")


if __name__ == "__main__":
    main()
