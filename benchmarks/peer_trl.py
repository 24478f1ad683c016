"""SFT tokens/s of Muster against TRL's SFTTrainer under accelerate with DeepSpeed ZeRO, two processes, TRL in its own environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import sft, workload
from benchmarks.options import Options, Skipped
from benchmarks.processes import CommandFailed, run
from benchmarks.record import ROOT, largest_difference, ratios, spread

PINS = (
    "trl==1.16.0",
    "torch==2.13.0",
    "deepspeed==0.19.8",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "transformers==5.23.0",
)
VENVS = ROOT / "build" / "benchmarks"
ROWS = 2000
TARGET = 1.0
_BUILD_S = 1200.0
_PACKED_ROWS = 3
"""Packed rows of a worker in a step of TRL: with Muster's batch of 16 samples a worker has 2.5 of them on average.
TRL runs them one after the other: in one micro-batch it would lay them into a single row of 1,536 tokens, and without a
kernel for packed rows attention pays for that."""


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of Muster and TRL, unpacked and packed."""
    python = environment(folder)
    work = workload.make(folder, ROWS)
    kinds = [options.only] if options.only else ["unpacked", "packed"]
    figures = {kind: _compare(options, folder, work, python, kind == "packed") for kind in kinds}
    return {"stage": options.stage, "steps": options.steps, "peer": list(PINS), "target_packed": TARGET, **figures}


def environment(folder: Path, name: str = "trl", pins: Sequence[str] = PINS) -> Path:
    """The python that has TRL, built on first use. Raises Skipped if it cannot be built."""
    venv = VENVS / name
    python, ready = venv / "bin" / "python", venv / ".ready"
    wanted = "\n".join(pins) + "\n"
    if ready.exists() and ready.read_text() == wanted:
        return python
    print(f"building {venv} with {', '.join(pins)}: minutes", file=sys.stderr)
    try:
        run([sys.executable, "-m", "venv", str(venv)], folder=folder, env={}, timeout_s=_BUILD_S)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, *pins], folder=folder, env={}, timeout_s=_BUILD_S)
    except CommandFailed as error:
        raise Skipped(f"TRL's environment cannot be built: {error}") from error
    ready.write_text(wanted)
    return python


def _zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings for TRL."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _compare(options: Options, folder: Path, work: workload.Workload, python: Path, pack: bool) -> dict[str, Any]:
    training = sft.Training(steps=1 + options.steps, stage=options.stage, pack=pack, timeout_s=options.timeout_s)
    ours, theirs = [], []
    for number in range(options.rounds):
        name = f"{'packed' if pack else 'unpacked'}-{number}"
        ours.append(sft.muster(work, training, folder / name, folder / "cache").curve)
        theirs.append(trl(work, training, python, folder))
    return {
        "ratio": ratios([c.tokens_per_s for c in ours], [c.tokens_per_s for c in theirs]),
        "muster_tokens_per_s": spread([c.tokens_per_s for c in ours], 1),
        "trl_tokens_per_s": spread([c.tokens_per_s for c in theirs], 1),
        "start_ratio": ratios([c.first_step_s for c in ours], [c.first_step_s for c in theirs]),
        "muster_first_step_s": spread([c.first_step_s for c in ours], 2),
        "trl_first_step_s": spread([c.first_step_s for c in theirs], 2),
        **_losses(ours[0], theirs[0], pack),
    }


def _losses(ours: sft.Curve, theirs: sft.Curve, pack: bool) -> dict[str, Any]:
    """Unpacked, both train on the same 16 rows in every step; packed, TRL's steps hold other samples than Muster's."""
    losses = {"muster_last_loss": ours.losses[-1], "trl_last_loss": theirs.losses[-1]}
    if pack:
        return losses
    return {**losses, "loss_difference": largest_difference(ours.losses, theirs.losses)}


def trl(work: workload.Workload, training: sft.Training, python: Path, folder: Path) -> sft.Curve:
    """The same training by TRL's trainer for that recipe. Raises CommandFailed."""
    packs = training.pack and training.recipe == "sft"  # TRL does not pack pairs
    rows_a_device, accumulate = (1, _PACKED_ROWS) if packs else (training.batch // sft.WORKERS, 1)
    script = [str(ROOT / "benchmarks" / "trl_train.py"), training.recipe]
    script += [str(work.model), str(work.rows), str(folder / "trl-out")]
    numbers = {
        "--steps": training.steps,
        "--rows-a-device": rows_a_device,
        "--accumulate": accumulate,
        "--rate": sft.RATE,
        "--max-length": workload.MAX_LENGTH,
    }
    settings = [str(word) for pair in numbers.items() for word in pair] + (["--pack"] if packs else [])
    env = sft.environment(folder / "cache") | {"DS_ACCELERATOR": "cpu"}
    command = [*launcher(python, training.stage, folder), *script, *settings]
    finished = run(command, folder=folder, env=env, timeout_s=training.timeout_s)
    return sft.printed_curve(finished.lines)


def launcher(python: Path, stage: int, folder: Path) -> list[str]:
    """The beginning of a command: accelerate with DeepSpeed on two processes."""
    zero = folder / "zero.json"
    zero.write_text(json.dumps(_zero(stage)))
    launch = [str(python), "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1"]
    processes = ["--num_processes", str(sft.WORKERS), "--main_process_port", "0"]
    return [*launch, *processes, "--deepspeed_config_file", str(zero)]
