"""What a plan says of runs that others have published: `python -m benchmarks.published` prints
the table of docs/planning.md.

One set of constants for all rows (launcher/plan/step_time.py), no row with one of its own.
What a source does not state is assumed here, in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster import catalog
from launcher.plan import step_time
from launcher.plan.step_time import Seated, Work
from training.config import CFT, PPO, SFT, Phase, Sharding
from training.estimate.memory import Models, Setting, setting_of
from training.estimate.parameters import Shape, shape_of


@dataclass(frozen=True)
class Row:
    """One published figure beside what is predicted of it."""

    what: str
    source: str
    published: float
    predicted: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.predicted / self.published


# arXiv:2405.11143v4, tables 3 and 5: LLaMA-2 on A800, 1,024 prompts, one epoch; workers of actor, critic, reference,
# reward; engines, GPUs of each, responses that each writes at a time. Seconds: writing, weights sent, scores, learning.
_PPO = {
    "meta-llama/Llama-2-7b-hf": ((4, 4, 2, 2), (4, 1, 16), (262.96, 4.32, 32.70, 171.13)),
    "meta-llama/Llama-2-13b-hf": ((8, 8, 4, 4), (8, 1, 8), (372.14, 10.03, 29.58, 197.18)),
    "codellama/CodeLlama-34b-hf": ((8, 8, 4, 4), (4, 2, 8), (720.50, 35.47, 326.00, 444.43)),
    "meta-llama/Llama-2-70b-hf": ((4, 4, 4, 4), (4, 4, 4), (2252.79, 111.65, 323.38, 1800.71)),
}
PPO_ASSUMED = (
    "prompts and responses of 1,024 tokens each (the repository's scripts; the paper does not say), critic and reward "
    "model of the policy's size, gradient checkpointing, 128 responses an update, a micro-batch of as many responses "
    "as an engine writes at a time; every engine finishes a batch before it begins the next"
)
CFT_ASSUMED = (
    "one epoch; 1,400 tokens a row (4,486 bytes on the data's card), gradient checkpointing, a micro-batch of one row; "
    "the start, and a checkpoint of DeepSpeed's every ten steps, for which training waits: the best of several was "
    "chosen, the paper does not say of how many"
)
_CFT_SAVES, _NATIVE_BYTES = 10, 21
TRAINING_ASSUMED = "global batch as published; full rows; packed"


def ppo() -> Iterator[Row]:
    gpu = catalog.gpu("A800")
    machine = catalog.default_machine(gpu)
    for name, (workers, (engines, tensor_parallel, batch), seconds) in _PPO.items():
        shape = shape_of(name)
        phase = PPO.model_validate(
            {
                "recipe": "ppo", "model": {"path": name, "gradient_checkpointing": True}, "reward": "reward",
                "data": {"train": "-", "max_length": 1024}, "rollout_batch": 1024, "batch": 128,
                "response_tokens": 1024,
                "ppo_epochs": 1, "micro_batch": batch, "sharding": {"stage": 3, "offload": "cpu"},
            }
        )  # fmt: skip
        groups = [
            Seated((role,), _setting(phase, count))
            for role, count in zip(("policy", "critic", "reference", "reward"), workers, strict=True)
        ]
        models = Models(shape, shape.as_classifier, [shape.as_classifier])
        parts = step_time.iteration_s(phase, models, groups, machine, Work(rows=None, tokens=1024, response=1024))
        parts["generate"] = step_time.writing_s(
            shape, machine, responses=1024, prompt=1024, response=1024, copies=engines, tensor_parallel=tensor_parallel,
            batch=batch,
            how="engine",
        )  # fmt: skip
        size = name.rpartition("-")[0].rpartition("-")[2]
        what = f"PPO, {size} on {sum(workers) + engines * tensor_parallel} A800: "
        for part, published in zip(("generate", "learn"), (seconds[0], seconds[3]), strict=True):
            yield Row(what + part, "arXiv:2405.11143v4", published, parts[part], "s")
        yield Row(what + "an iteration", "arXiv:2405.11143v4", sum(seconds), sum(parts.values()), "s")


def cft() -> Iterator[Row]:
    """Qwen2.5-Math-7B on 50,000 critiques."""
    shape = shape_of("Qwen/Qwen2.5-Math-7B")
    phase = CFT.model_validate(
        {
            "recipe": "cft", "model": {"path": "-", "gradient_checkpointing": True},
            "data": {"train": "-", "pack": False},
            "micro_batch": 1, "sharding": {"stage": 3}, "resources": {"workers": 8},
        }
    )  # fmt: skip
    machine = catalog.default_machine(catalog.gpu("H100"))
    where = _setting(phase, 8, longest=1400)
    step = step_time.step_s(shape, where, machine, 512, 1400)
    seconds = 98 * step + step_time.starting_s(Models(shape), machine)
    yield Row("CFT, 7B, 50,000 rows on 8 H100: start and steps alone", "arXiv:2501.17703", 1.0, seconds / 3600, "h")
    seconds += _CFT_SAVES * _NATIVE_BYTES * shape.parameters / (step_time.STORAGE_GB_S * 1e9)
    yield Row("CFT, 7B, 50,000 rows on 8 H100", "arXiv:2501.17703", 1.0, seconds / 3600, "h")


# Tokens a second and GPU. (what, source, model, GPU, GPUs, samples a GPU, tokens of each, recomputes, published)
_TRAINING = [
    ("LLaMA-2 7B", "PyTorch blog 2024-03", "llama-2-7b-hf", "A100", 128, 2, 4096, False, 3700),
    ("LLaMA-2 70B", "PyTorch blog 2024-03", "llama-2-70b-hf", "A100", 128, 2, 4096, True, 370),
    ("LLaMA-2 7B", "PyTorch blog 2024-03", "llama-2-7b-hf", "H100", 96, 2, 4096, False, 7500),
    ("LLaMA-2 70B", "torchtitan", "llama-2-70b-hf", "A100", 64, 2, 4096, True, 353),
    ("LLaMA-3 8B", "torchtitan", "meta-llama-3-8b", "A100", 64, 1, 8192, False, 2973),
    ("LLaMA-3.1 8B, eager", "torchtitan", "llama-3.1-8b", "H100", 8, 2, 8192, False, 5762),
]


def training() -> Iterator[Row]:
    for what, source, model, kind, gpus, samples, length, recomputes, published in _TRAINING:
        shape: Shape = shape_of(f"known/{model}")
        phase = SFT.model_validate(
            {
                "recipe": "sft", "model": {"path": "-", "gradient_checkpointing": recomputes}, "batch": gpus * samples,
                "data": {"train": "-", "max_length": length}, "micro_batch": samples, "sharding": {"stage": 3},
            }
        )  # fmt: skip
        machine = catalog.default_machine(catalog.gpu(kind))
        step = step_time.step_s(shape, _setting(phase, gpus), machine, gpus * samples, length)
        yield Row(
            f"{what}, {gpus} {kind}, {length:,} tokens", source, published, samples * length / step, "tokens/s a GPU"
        )


def _setting(phase: Phase, workers: int, longest: int | None = None) -> Setting:
    where = setting_of(phase, dtype="bf16", on_gpu=True, longest=longest)
    return type(where)(**{**vars(where), "workers": workers, "sharding": Sharding(**phase.sharding.model_dump())})


def rows() -> list[Row]:
    return [*cft(), *ppo(), *training()]


def main() -> None:
    print("| run | source | published | predicted | predicted / published |")
    print("|---|---|---|---|---|")
    for row in rows():
        digits = 2 if row.published < 10 else 0
        print(
            f"| {row.what} | {row.source} | {row.published:,.{digits}f} {row.unit} | {row.predicted:,.{digits}f} "
            f"{row.unit} | {row.ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
