"""What one GPU does, in one process without Ray: tokens/s, MFU and memory, what each choice brings;
the parts of an iteration of PPO.

MFU: floating-point operations of forward and backward pass of all weights that a token meets, nothing twice, attention
halved because it is causal (with adapters the frozen weights have no gradients: 4 a weight instead of 6), over what the
data sheet says of dense bf16.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peers, sft, trl_ppo, workload
from benchmarks.options import Options, Skipped
from benchmarks.processes import CommandFailed, run
from benchmarks.record import gpu_name, spread
from benchmarks.workload import Length, Lengths, Shape

WARM_UP = 3
"""Steps that do not count: kernels are chosen, or compiled."""
ROWS = 128
BATCH = 16
SEVEN_B = Shape(4096, 11008, 32, 32, 32000)
"""LLaMA-2 7B's."""
ONE_B = Shape(2048, 5632, 22, 32, 32000)
"""1.3 billion parameters."""


@dataclass(frozen=True)
class Case:
    """What is trained, on samples that all have so many tokens."""

    shape: Shape
    tokens: int
    lora: dict[str, int] | None
    target_mfu: float | None = None
    choices: bool = False
    """Whether each of CHOICES is measured, too."""


ADAPTERS = {"rank": 16, "alpha": 32}
CASES = {
    "7b-lora-2048": Case(SEVEN_B, 2048, ADAPTERS, 0.50, choices=True),
    "7b-lora-4096": Case(SEVEN_B, 4096, ADAPTERS),
    "1b-full-2048": Case(ONE_B, 2048, None, 0.45, choices=True),
    "1b-full-4096": Case(ONE_B, 4096, None),
}
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "kernels: torch": {"model": {"kernels": "torch"}},
    "compile": {"model": {"compile": True}},
    "attention: sdpa": {"model": {"attention": "sdpa"}},
    "attention: flex": {"model": {"attention": "flex_attention"}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
    "not packed": {"data": {"pack": False}},
    "micro-batches twice as large": {"phase": {"micro_tokens": 8192}},
}
"""Laid over the sections of a job that leaves everything to Muster."""
PPO = "ppo-1b"


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Each case once, a process each. A choice that this machine cannot make says why."""
    gpu = gpu_name()
    if gpu is None:
        raise Skipped("this machine has no GPU that nvidia-smi knows")
    figures: dict[str, Any] = {"gpu": gpu, "steps": options.steps, "batch": BATCH}
    for name, case in CASES.items():
        if options.only in (None, name):
            work = peers.apart(make, folder / name, case, device="cuda", dtype="bfloat16")
            figures[name] = {"target_mfu": case.target_mfu, "auto": train(work, case, options, gpu, {})}
            for choice, settings in CHOICES.items() if case.choices else ():
                try:
                    figures[name][choice] = train(work, case, options, gpu, settings)
                except CommandFailed as error:
                    figures[name][choice] = {"failed": str(error).splitlines()[-1]}
    if options.only in (None, PPO):
        figures[PPO] = _ppo(options, folder / PPO)
    return figures


def make(folder: Path, case: Case, *, device: str, dtype: str) -> workload.Workload:
    """Rows somewhat longer than they may be, to be cut: every sample then is full,
    and a row of several is full, too."""
    length = Length(0.0, 0.0, 1), Length(math.log(1.3 * case.tokens), 0.0, 2 * case.tokens)
    return workload.make(
        folder, ROWS, shape=case.shape, lengths=Lengths(*length, case.tokens), device=device, dtype=dtype
    )


def job(
    work: workload.Workload, case: Case, options: Options, settings: dict[str, dict[str, Any]], *, on_gpu: bool
) -> dict[str, Any]:
    """Of Muster; `settings` are laid over its sections."""
    data = {"train": str(work.rows), "template": "none", "max_length": case.tokens, "overlong": "truncate"}
    phase = {
        "data": {**data, **settings.get("data", {})},
        "max_steps": WARM_UP + options.steps,
        "batch": BATCH,
        "learning_rate": 1e-5,
        "checkpoint": {"every": 1_000_000},
    }
    model = {"path": str(work.model), "dtype": "bf16" if on_gpu else "fp32", "lora": case.lora}
    return {
        "name": "bench",
        "model": {**model, **settings.get("model", {})},
        "resources": {"workers": 1, "gpus_per_worker": 1 if on_gpu else 0},
        "sharding": {"stage": options.stage},
        "phases": {"sft": {**phase, **settings.get("phase", {})}},
    }


def train(
    work: workload.Workload, case: Case, options: Options, gpu: str | None, settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Tokens/s, MFU and the most memory. `gpu` None: on this machine's CPUs. Raises CommandFailed."""
    rows = _metrics(work, job(work, case, options, settings, on_gpu=gpu is not None), "sft", options)
    rates = [row["tokens"] / row["step_s"] for row in rows[WARM_UP:]]
    return {
        "tokens_per_s": spread(rates, 1),
        "mfu": spread([rate * flops_a_token(work.model, case) / peak(gpu) for rate in rates]) if gpu else None,
        "memory_gib": round(max(row["memory_gib"] for row in rows), 2),
        "last_loss": rows[-1]["loss"],
    }


def flops_a_token(model: Path, case: Case) -> float:
    """What MFU counts."""
    from launcher.plan.step_time import useful_flops
    from training.estimate.parameters import shape_of

    return useful_flops(shape_of(str(model)), 1, case.tokens, adapters=case.lora is not None)


def peak(gpu: str) -> float:
    """FLOP/s of a GPU, dense bf16, by its data sheet."""
    from cluster import catalog

    return catalog.gpu(gpu).tflops * 1e12


def _metrics(work: workload.Workload, settings: dict[str, Any], phase: str, options: Options) -> list[dict[str, Any]]:
    folder = work.model.parent / f"run-{len(list(work.model.parent.glob('run-*')))}"
    folder.mkdir()
    (folder / "job.yaml").write_text(json.dumps(settings))
    env = {**sft.environment(work.model.parent / "cache"), "OMP_NUM_THREADS": str(os.cpu_count())}
    env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    run(["muster", "run", "--inline", "job.yaml"], folder=folder, env=env, timeout_s=options.timeout_s)
    lines = (folder / f"runs/bench/{phase}/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "step_s" in row]


def _ppo(options: Options, folder: Path) -> dict[str, Any]:
    """Four models of a billion parameters in one process, of which two are trained."""
    roles = peers.apart(trl_ppo.make, folder, ONE_B)
    settings = trl_ppo.job(
        roles, options.stage, 2 + max(2, options.steps // 3), rollout_batch=64, batch=32, response_tokens=256
    )
    settings["model"]["dtype"] = "bf16"
    settings["resources"] = {"workers": 1, "gpus_per_worker": 1}
    rows = _metrics(workload.Workload(roles.policy, roles.prompts, 512), settings, "ppo", options)[2:]
    return {
        "iteration_s": spread([row["step_s"] for row in rows], 2),
        **{part: spread([row[part] for row in rows], 2) for part in trl_ppo.PARTS},
        "response_tokens": spread([row["response_tokens"] for row in rows], 1),
        "memory_gib": round(max(row["memory_gib"] for row in rows), 2),
    }
