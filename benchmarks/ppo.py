"""What PPO costs beside the models' work, and what adapters spare: the driver's share,
the way of the weights, the memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import trl_ppo, workload
from benchmarks.options import Options
from benchmarks.record import ratios, spread

TARGET_DRIVER_SHARE = 0.02
LORA = {"rank": 16, "alpha": 32}
ITERATIONS = 4
"""The first is not counted."""
_TOGETHER = ["policy", "reference", "critic", "reward"]


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """One run of each kind a round: two workers, a rollout group apart,
    one worker with four models, one with adapters."""
    small = trl_ppo.make(folder)
    (folder / "large").mkdir()
    large = trl_ppo.make(folder / "large", workload.LARGE)
    adapted = replace(large, reward=_adapter(large, folder / "adapter"))
    shares: list[float] = []
    sent: list[float] = []
    copied: list[float] = []
    memory: dict[str, list[float]] = {"full": [], "lora": []}
    for number in range(options.rounds):

        def rows(
            kind: str, roles: trl_ppo.Roles, lora: dict[str, int] | None = None, number: int = number, **phase: Any
        ) -> list[dict[str, Any]]:
            place = folder / f"{kind}-{number}"
            return trl_ppo.muster(roles, options, ITERATIONS, place, folder / "cache", lora=lora, **phase)[1][1:]

        shares += [row["driver_s"] / row["step_s"] for row in rows("together", small)]
        apart = [{"roles": _TOGETHER, "workers": 1}, {"roles": ["rollout"], "workers": 1}]
        size = _bytes(large)
        sent += [size / row["sync_s"] for row in rows("apart", large, groups=apart, rollout_batch=4, batch=4)]
        copied += [size / _copy_s(size) for _ in range(ITERATIONS - 1)]
        alone: dict[str, Any] = {"groups": [{"roles": _TOGETHER, "workers": 1}], "rollout_batch": 4, "batch": 4}
        memory["full"].append(max(row["memory_gib"] for row in rows("full", large, **alone)))
        memory["lora"].append(max(row["memory_gib"] for row in rows("lora", adapted, LORA, **alone)))
    return {
        "stage": options.stage,
        "driver_share": spread(shares),
        "target_driver_share": TARGET_DRIVER_SHARE,
        "sync_mb": round(_bytes(large) / 1e6, 1),
        "sync_to_copy": ratios(sent, copied),
        "sync_gb_per_s": spread([rate / 1e9 for rate in sent], 2),
        "copy_gb_per_s": spread([rate / 1e9 for rate in copied], 2),
        "lora_memory_ratio": ratios(memory["lora"], memory["full"]),
        **{f"{name}_memory_gib": spread(values, 2) for name, values in memory.items()},
    }


def _adapter(roles: trl_ppo.Roles, folder: Path) -> Path:
    """A reward model that is an adapter of the policy's own base."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base: Any = AutoModelForSequenceClassification.from_pretrained(roles.policy, num_labels=1)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=layers)
    get_peft_model(base, settings).save_pretrained(str(folder))
    return folder


def _bytes(roles: trl_ppo.Roles) -> int:
    """Of the policy's weights, as they are sent."""
    from transformers import AutoModelForCausalLM

    return sum(4 * parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(roles.policy).parameters())


def _copy_s(size: int) -> float:
    """Seconds to copy so many bytes in memory, with one thread."""
    import torch

    torch.set_num_threads(1)
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began
