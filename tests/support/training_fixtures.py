"""A tiny model, its tokenizer and rows to train it on, made once;
and a way to run a recipe's driver on test workers."""

from __future__ import annotations

import itertools
import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from training.checkpoint.repository import opened
from training.config import Phase
from training.recipes import RECIPES, resolve
from training.storage import open_storage

VOCABULARY = 300
_attempts = itertools.count(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with model/ (0.1 M parameters, every weight random and large enough to matter)
    and rows for every recipe.

    train.jsonl and eval.jsonl are for SFT; those of another recipe begin with its name: reward.train.jsonl.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    rows = [_row(rng) for _ in range(300)]
    _write(folder / "train.jsonl", rows[:260])
    _write(folder / "eval.jsonl", rows[260:])
    for recipe, made in OTHER_ROWS.items():
        _write(folder / f"{recipe}.train.jsonl", [made(rng) for _ in range(260)])
        _write(folder / f"{recipe}.eval.jsonl", [made(rng) for _ in range(40)])
    _tokenizer([row["prompt"] + row["completion"] for row in rows]).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, initializer_range=0.1, tie_word_embeddings=False,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def _row(rng: random.Random) -> dict[str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    words = " and so it is" * rng.randrange(0, 8)
    return {"prompt": f"Q: {a} + {b}{' + 0' * rng.randrange(0, 4)} = ", "completion": f"{a + b}{words}"}


def _text(rng: random.Random) -> dict[str, str]:
    """A document; every tenth is too long for the canonical run and is learnt in pieces."""
    return {"text": " ".join(f"{_row(rng)['prompt']}{rng.randrange(100)}." for _ in range(rng.choice((1, 1, 2, 9))))}


def _critique(rng: random.Random) -> dict[str, str]:
    verdict = rng.choice(("right", "wrong"))
    row = _row(rng)
    return {
        "question": row["prompt"], "answer": row["completion"][:2], "verdict": verdict,
        "critique": f"Critique: {row['completion']}. Conclusion: {verdict} [END]",
    }  # fmt: skip


def _pair(rng: random.Random) -> dict[str, Any]:
    row = _row(rng)
    return {
        "prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{rng.randrange(200)} or so",
        "margin": rng.choice((0, 0.5)),
    }  # fmt: skip


def _prompt(rng: random.Random) -> dict[str, str]:
    row = _row(rng)
    return {"prompt": row["prompt"], "answer": row["completion"].split()[0]}


OTHER_ROWS = {"pretrain": _text, "cft": _critique, "reward": _pair, "ppo": _prompt}


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


class Recorder:
    """The hooks of a run, remembering what it was told."""

    job_hash = "0" * 16
    job_hash_before = ""
    resume_at: int | None = None
    accepted_before = 0
    skipped: frozenset[int] = frozenset()

    def __init__(self, folder: Path | str, stop_after: int | None = None):
        self.checkpoints = opened(open_storage(folder), next(_attempts))
        self.profiles = open_storage(folder) / "profile"
        self.stop_after = stop_after
        self.rows: list[dict] = []
        self.events: list[tuple[str, dict]] = []

    def flush(self) -> None:
        """It is kept in memory."""

    def answers(self, step, kind, rows) -> None:
        self.answered = {**getattr(self, "answered", {}), (step, kind): list(rows)}

    def samples(self, step, rows) -> None:
        self.sampled = [*getattr(self, "sampled", []), *rows]

    def paces(self, seconds_a_token) -> None:
        self.paces_seen = list(seconds_a_token)

    def gpus_full(self, fractions) -> None:
        self.gpus_seen = list(fractions)

    def log(self, row) -> None:
        self.rows.append(dict(row))

    def event(self, kind: str, **info: Any) -> None:
        self.events.append((kind, info))

    def started(self, info: Any, step: int, *, evaluates: bool = False) -> None:
        self.info, self.first = info, step

    def make_room(self, best) -> None:
        """There is no quota."""

    def save_requested(self, step) -> bool:
        """At the steps `save_at`."""
        return step in getattr(self, "save_at", ())

    def clock(self) -> float:
        """Seconds that a test says have gone by."""
        return getattr(self, "seconds", 0.0)

    def stop_requested(self) -> bool:
        steps = [row["step"] for row in self.rows if "loss" in row]
        return self.stop_after is not None and bool(steps) and steps[-1] >= self.stop_after

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]


@pytest.fixture(scope="session")
def train(tiny, tmp_path_factory):
    """train(workers, checkpoints=..., stop_after=..., **settings of the phase) -> Recorder."""
    from tests.support.fork_group import ForkWorkers

    def run(
        workers: int = 1, checkpoints: Path | str | None = None, stop_after: int | None = None, **settings: Any
    ) -> Recorder:
        of_the_run = {
            name: settings.pop(name)
            for name in ("job_hash", "job_hash_before", "resume_at", "accepted_before", "skipped")
            if name in settings
        }
        kind = settings.pop("hooks", Recorder)
        phase = phase_of(tiny, settings.pop("recipe", "sft"), workers=workers, **settings)
        hooks = kind(checkpoints or tmp_path_factory.mktemp("checkpoints"), stop_after)
        vars(hooks).update(of_the_run)
        targets = RECIPES[phase.recipe].roles
        groups = {}
        with ExitStack() as stack:
            for roles, seated in phase.placements:
                own = {role: targets[role] for role in roles or targets}
                size = seated.resources.workers
                team = stack.enter_context(ForkWorkers(size, own, seated, str(tiny / "cache")))
                groups |= {role: team[role] for role in own}
            hooks.last = resolve(RECIPES[phase.recipe].run)(phase, groups, hooks)
        return hooks

    return run


def sft_phase(tiny: Path, **settings: Any) -> Phase:
    return phase_of(tiny, "sft", **settings)


def phase_of(
    tiny: Path,
    recipe: str,
    *,
    workers: int = 1,
    stage: int = 0,
    dtype: str = "fp32",
    lora: dict[str, Any] | None = None,
    **settings: Any,
) -> Phase:
    """A phase that exercises what training has: clipping, decay on and off, warm-up and decay of the rate."""
    prefix = "" if recipe == "sft" else f"{recipe}."
    data = {"train": str(tiny / f"{prefix}train.jsonl"), **settings.pop("data", {})}
    draft = {
        "recipe": recipe, "seed": 5, "data": data, "batch": 16,
        "model": {"path": str(tiny / "model"), "dtype": dtype, "lora": lora},
        "max_steps": 8, "learning_rate": 3e-3, "optimizer": {"weight_decay": 0.1}, "clip": 1.0,
        "schedule": {"warmup": 2}, "sharding": {"stage": stage}, "resources": {"workers": workers},
        **settings,
    }  # fmt: skip
    return RECIPES[recipe].config.model_validate(draft)
