"""Pairs/s of Muster's reward model against TRL's RewardTrainer under accelerate with DeepSpeed ZeRO, two processes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import peer_trl, sft, workload
from benchmarks.options import Options
from benchmarks.processes import run
from benchmarks.record import ROOT, ratios, spread

ROWS = 1000
TARGET = 1.0


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of Muster and TRL."""
    python = peer_trl.environment(folder)
    work = workload.make_pairs(folder, ROWS)
    (folder / "zero.json").write_text(json.dumps(peer_trl.zero(options.stage)))
    training = sft.Training(steps=1 + options.steps, stage=options.stage, recipe="reward", timeout_s=options.timeout_s)
    ours, theirs = [], []
    for number in range(options.rounds):
        ours.append(sft.muster(work, training, folder / f"muster-{number}", folder / "cache").curve)
        theirs.append(_trl(work, training, python, folder))
    rates = [[_pairs_per_s(curve, training.batch) for curve in side] for side in (ours, theirs)]
    return {
        "stage": options.stage,
        "steps": options.steps,
        "peer": list(peer_trl.PINS),
        "target": TARGET,
        "ratio": ratios(*rates),
        "muster_pairs_per_s": spread(rates[0], 2),
        "trl_pairs_per_s": spread(rates[1], 2),
        "muster_last_loss": ours[0].losses[-1],
        "trl_last_loss": theirs[0].losses[-1],
    }


def _pairs_per_s(curve: sft.Curve, batch: int) -> float:
    """From outside, without the first step."""
    return batch * (len(curve.losses) - 1) / curve.rest_s


def _trl(work: workload.Workload, training: sft.Training, python: Path, folder: Path) -> sft.Curve:
    launch = [str(python), "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1"]
    processes = ["--num_processes", str(sft.WORKERS), "--main_process_port", "0"]
    zero = ["--deepspeed_config_file", str(folder / "zero.json")]
    script = [str(ROOT / "benchmarks" / "trl_reward.py"), str(work.model), str(work.rows), str(folder / "trl-out")]
    numbers = {
        "--steps": training.steps,
        "--batch": training.batch,
        "--workers": sft.WORKERS,
        "--rate": sft.RATE,
        "--max-length": workload.MAX_LENGTH,
    }
    settings = [str(word) for pair in numbers.items() for word in pair]
    env = sft.environment(folder / "cache") | {"DS_ACCELERATOR": "cpu"}
    finished = run(
        [*launch, *processes, *zero, *script, *settings], folder=folder, env=env, timeout_s=training.timeout_s
    )
    return sft.printed_curve(finished.lines)
