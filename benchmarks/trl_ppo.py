"""Seconds of an iteration of Muster's PPO against TRL's (the last version that has it) under
accelerate with DeepSpeed ZeRO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environments, peers, sft, workload
from benchmarks.options import Options
from benchmarks.processes import run
from benchmarks.record import ROOT, ratios, spread

TARGET = 0.5
ROWS = 400
ROLLOUT_BATCH = 32
"""Prompts of an iteration, on both workers together."""
MINIBATCHES = 2
PASSES = 2
RESPONSE_TOKENS = 48
"""At most."""
ENDS = 1 / 12
"""About the probability that a token is a response's last, where responses end. How long they are is measured."""
KINDS = {"ending": True, "full": False}
"""Whether responses end by themselves."""
PARTS = ("generate_s", "score_s", "learn_s")


@dataclass(frozen=True)
class Roles:
    """Model folders and prompts."""

    policy: Path
    reward: Path
    prompts: Path


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Rounds of Muster and TRL: the same models, prompts, lengths and number of updates."""
    python = environments.python_of(environments.TRL_PPO, folder)
    iterations = 1 + max(2, options.steps // 3)
    figures: dict[str, Any] = {
        "stage": options.stage,
        "iterations": iterations - 1,
        "rollout_batch": ROLLOUT_BATCH,
        "response_tokens": RESPONSE_TOKENS,
        "peer": environments.TRL_PPO.packages,
        "target": TARGET,
    }
    for kind, ends in KINDS.items():
        if options.only in (None, kind):
            roles = peers.apart(make, folder / kind, ends=ends)
            figures[kind] = _sides(roles, options, iterations, python)
    return figures


def _sides(roles: Roles, options: Options, iterations: int, python: Path) -> dict[str, Any]:
    folder = roles.prompts.parent
    ours, theirs, rows = [], [], []
    for number in range(options.rounds):
        curve, logged = muster(roles, options, iterations, folder / f"muster-{number}", folder / "cache")
        ours.append(curve)
        rows += logged[1:]
        theirs.append(_trl(roles, options, iterations, python, folder))
    return {
        "ratio": ratios([c.wall_step_s for c in ours], [c.wall_step_s for c in theirs]),
        "muster_iteration_s": spread([c.wall_step_s for c in ours], 2),
        "trl_iteration_s": spread([c.wall_step_s for c in theirs], 2),
        "start_ratio": ratios([c.first_step_s for c in ours], [c.first_step_s for c in theirs]),
        "memory_ratio": ratios([c.peak_gib for c in ours], [c.peak_gib for c in theirs]),
        "muster_peak_gib": spread([c.peak_gib for c in ours], 2),
        "trl_peak_gib": spread([c.peak_gib for c in theirs], 2),
        "muster_parts_s": {name: spread([row[name] for row in rows], 2) for name in PARTS},
        "muster_response_tokens": spread([row["response_tokens"] for row in rows], 1),
    }


def make(folder: Path, shape: workload.Shape = workload.SMALL, *, ends: bool = False) -> Roles:
    """A policy and a reward model with random weights. `ends`: each token may be the last of a
    response; else hardly any is."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder.mkdir(exist_ok=True)
    work = workload.make(folder, ROWS, shape=shape)
    reward = folder / "reward"
    torch.manual_seed(18)
    scorer = AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1)
    scorer.save_pretrained(reward)
    if ends:
        _let_end(work.model)
    AutoTokenizer.from_pretrained(work.model).save_pretrained(reward)
    prompts = folder / "prompts.jsonl"
    rows = (json.loads(line) for line in work.rows.read_text().splitlines())
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return Roles(work.model, reward, prompts)


def _let_end(model: Path) -> None:
    """Rewrite a model so that the end-of-text token has about the probability ENDS everywhere,
    however random the rest is.

    One number of the residual stream is the same for every token and no layer changes it;
    the head turns it into a logit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, 0] = 1.0
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        lm.lm_head.weight[:, 0] = 0.0
        hidden = lm.model(torch.arange(lm.config.vocab_size)[None, :64]).last_hidden_state[0]
        rest = torch.logsumexp(lm.lm_head(hidden), -1).mean()  # what the end has to be weighed against
        wanted = rest + torch.tensor(ENDS / (1 - ENDS)).log()
        lm.lm_head.weight[lm.config.eos_token_id] = 0.0
        lm.lm_head.weight[lm.config.eos_token_id, 0] = wanted / hidden[:, 0].mean()
    lm.save_pretrained(model)


def job(roles: Roles, stage: int, iterations: int, lora: dict[str, int] | None = None, **phase: Any) -> dict[str, Any]:
    """The job of Muster; `phase` is laid over its settings."""
    settings = {
        "data": {"train": str(roles.prompts), "template": "none", "max_length": 256},
        "reward": str(roles.reward),
        "rollout_batch": ROLLOUT_BATCH,
        "batch": ROLLOUT_BATCH // MINIBATCHES,
        "ppo_epochs": PASSES,
        "response_tokens": RESPONSE_TOKENS,
        "max_steps": iterations,
        "learning_rate": 1e-5,
        "critic_learning_rate": 1e-5,
        "clip": 1.0,
        "checkpoint": {"every": 1_000_000},
    }
    return {
        "name": "bench",
        "model": {"path": str(roles.policy), "dtype": "fp32", "lora": lora},
        "resources": {"workers": sft.WORKERS, "threads": 1, "gpus_per_worker": 0},
        "sharding": {"stage": stage},
        "phases": {"ppo": {**settings, **phase}},
    }


def muster(
    roles: Roles, options: Options, iterations: int, folder: Path, cache: Path, **phase: Any
) -> tuple[sft.Curve, list[dict[str, Any]]]:
    """`muster run` in the new folder `folder`: its curve, and its metrics as they are. Raises CommandFailed."""
    folder.mkdir()
    (folder / "job.yaml").write_text(json.dumps(job(roles, options.stage, iterations, **phase)))
    command = ["muster", "run", "job.yaml"]
    finished = run(command, folder=folder, env=sft.environment(cache), timeout_s=options.timeout_s, watch_memory=True)
    rows = [json.loads(line) for line in (folder / "runs/bench/ppo/metrics.jsonl").read_text().splitlines()]
    ends = [line.at for line in finished.lines if line.text.startswith("ppo  step")]
    return sft.curve(rows, ends, finished.peak_gib), rows


def _trl(roles: Roles, options: Options, iterations: int, python: Path, folder: Path) -> sft.Curve:
    script = [str(ROOT / "benchmarks" / "peer_trl_ppo.py"), str(roles.policy), str(roles.reward), str(roles.prompts)]
    numbers = {
        "--iterations": iterations,
        "--rollout-batch": ROLLOUT_BATCH,
        "--minibatches": MINIBATCHES,
        "--passes": PASSES,
        "--response-tokens": RESPONSE_TOKENS,
        "--processes": sft.WORKERS,
        "--rate": 1e-5,
    }
    words = [str(word) for pair in numbers.items() for word in pair]
    zero = folder / "zero.json"
    zero.write_text(json.dumps(peers.zero_settings(options.stage)))
    command = [*peers.accelerate(python, zero), *script, str(folder / "trl-out"), *words]
    env = {**sft.environment(folder / "trl-cache"), **peers.ENVIRONMENT}
    return sft.printed_curve(run(command, folder=folder, env=env, timeout_s=options.timeout_s, watch_memory=True))
