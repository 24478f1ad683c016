"""What the scripts have in common that train in a peer's environment. Knows neither Muster nor a peer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def arguments() -> argparse.Namespace:
    """The training that is wanted: with whole global batches in the file's order,
    at a constant rate, clipped at 1, in fp32."""
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "out"):
        parser.add_argument(name, type=Path)
    for name in ("steps", "rows-a-device", "accumulate", "processes", "max-length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--zero", type=Path, required=True, help="DeepSpeed's settings")
    parser.add_argument("--recipe", choices=("sft", "reward"), default="sft")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all weights are trained")
    return parser.parse_args()


def leave_shared_memory_op_out() -> None:
    """DeepSpeed would compile an op that only its inference needs: minutes at the first use.
    Muster leaves it out as well."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def print_step(step: int, loss: float, tokens: int) -> None:
    """To be called on rank 0 at the end of a step, with the loss and the non-padding tokens of the global batch."""
    row = json.dumps({"step": step, "loss": loss, "tokens": tokens})
    print(f"\n{row}", flush=True)  # a progress bar may stand in the line


class StepPrinter(TrainerCallback):
    """Prints what a trainer of transformers logs of a step."""

    def __init__(self) -> None:
        self.tokens_before = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        tokens = int(logs.get("num_tokens", state.num_input_tokens_seen))
        print_step(state.global_step, float(logs["loss"]), tokens - self.tokens_before)
        self.tokens_before = tokens
