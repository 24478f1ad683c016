"""The memory that a plan tells, against what is measured: tensors before the optimizer steps,
and the most that was ever allocated."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from tests.support.training_fixtures import Recorder, phase_of
from training.estimate.memory import Models, setting_of, states, team
from training.estimate.parameters import shape_of
from training.recipes import RECIPES, resolve

SHAPES = {
    "wide": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 2000,
    },
    "deep": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
    "lexical": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 20000,
    },
}
LORA = {"rank": 8, "alpha": 16}
TOLERANCE = 0.10
ALWAYS = ("process", "copy for saving")
"""What is no tensor of training."""


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A folder for each shape, with a model and rows of one length,
    so that micro-batches are as full as they may be."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(tiny / "model", folder / "model")
        torch.manual_seed(0)
        config = LlamaConfig(**shape, eos_token_id=0, tie_word_embeddings=False, max_position_embeddings=512)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        question, answer = "Q: 12 + 34 = " * 6, "46 and so it is" * 8
        rows = {
            "": {"prompt": question, "completion": answer},
            "pretrain.": {"text": question + answer},
            "cft.": {"question": question, "answer": "46", "critique": answer, "verdict": "right"},
            "reward.": {"prompt": question, "chosen": answer, "rejected": answer[:-3] + "so"},
            "ppo.": {"prompt": question, "answer": "46"},
        }  # fmt: skip
        for recipe, row in rows.items():
            (folder / f"{recipe}train.jsonl").write_text((json.dumps(row) + "\n") * 64)
        made[name] = folder
    return made


def measured(folder, phase, tmp_path):
    """(bytes of tensors before a step, bytes allocated at most) of each worker, and the facts of the data."""
    from tests.support.fork_group import ForkWorkers

    roles = {"memory": "tests.support.roles:Memory", **RECIPES[phase.recipe].roles}
    with ForkWorkers(phase.resources.workers, roles, phase, str(folder / "cache")) as workers:
        groups = {role: workers[role] for role in RECIPES[phase.recipe].roles}

        def begin() -> None:
            [answer.result() for answer in workers["memory"].call("begin")]

        if phase.recipe == "ppo":
            begin()
            groups.pop("rollout")
            resolve(RECIPES["ppo"].run)(phase, groups, Recorder(tmp_path, stop_after=3))
        else:
            [answer.result() for answer in groups["trainer"].call("setup")]
            begin()  # loading frees in threads, which the count of allocations misses
            [answer.result() for answer in groups["trainer"].call("train", 0, 3)]
        return [answer.result() for answer in workers["memory"].call("end")]


def lengths(folder, phase):
    """Of the longest sample, and the share of its tokens that are targets."""
    from training.data.phase_data import open_stores

    store = open_stores(phase, folder / "cache").train
    return int(store.lengths.max()), float(store.target_counts.sum() / store.lengths.sum())


def phase_in(folder, recipe="sft", **settings):
    settings = {"batch": 8, "max_steps": 3, "micro_batch": 2, "data": {"pack": False}} | settings
    return phase_of(folder, recipe, **settings)


def told(parts: Counter, *but: str) -> int:
    return sum(size for what, size in parts.items() if not any(name in what for name in but))


def one_in_three(cases: list[tuple]) -> list:
    """Each takes seconds, and all go the same way: the others are for `make test-long`."""
    return [case if place % 3 == 0 else pytest.param(*case, marks=pytest.mark.long) for place, case in enumerate(cases)]


STATES = (
    [
        ("wide", stage, workers, dtype, lora)
        for stage in (0, 1, 2, 3)
        for workers in (1, 2)
        for dtype in ("bf16", "fp32")
        for lora in (None,)
        # With these most of the gradients are gone by then; the peaks below have them.
        if (stage, workers, dtype) != (1, 2, "fp32")
    ]
    + [("deep", stage, 2, "bf16", LORA) for stage in (0, 1, 2, 3)]
    + [("lexical", stage, 2, "bf16", None) for stage in (2, 3)]
)


@pytest.mark.cpu
@pytest.mark.parametrize(("name", "stage", "workers", "dtype", "lora"), one_in_three(STATES))
def test_model_states(folders, tmp_path, name, stage, workers, dtype, lora):
    """Every tensor that is alive just before the optimizer steps; nothing is gathered then."""
    folder = folders[name]
    phase = phase_in(folder, stage=stage, workers=workers, dtype=dtype, lora=lora)
    where = setting_of(phase, dtype=dtype, on_gpu=False)
    needs = states(shape_of(str(folder / "model")), where)
    predicted = told(needs.device, "a layer, gathered", "weights in bf16")
    for found, _ in measured(folder, phase, tmp_path):
        print(f"{name} {stage} {workers} {dtype} lora={bool(lora)}: {predicted / found:.3f}")
        assert found == pytest.approx(predicted, rel=TOLERANCE)


PEAKS = [
    (recipe, name, stage, dtype, lora, settings)
    for recipe, name, stage, dtype, lora, settings in [
        ("sft", "wide", 0, "bf16", None, {}),
        ("sft", "wide", 1, "bf16", None, {}),
        ("sft", "wide", 2, "bf16", None, {}),
        ("sft", "wide", 3, "bf16", None, {}),
        ("sft", "wide", 0, "fp32", None, {}),
        ("sft", "wide", 1, "fp32", None, {}),
        ("sft", "wide", 2, "fp32", None, {}),
        ("sft", "wide", 3, "fp32", None, {}),
        ("sft", "lexical", 2, "bf16", None, {}),
        ("sft", "deep", 2, "bf16", None, {"micro_batch": 8, "batch": 16}),
        ("sft", "deep", 3, "bf16", LORA, {"micro_batch": 8, "batch": 16}),
        ("sft", "deep", 2, "fp32", LORA, {"micro_batch": 8, "batch": 16}),
        (
            "pretrain",
            "lexical",
            2,
            "bf16",
            None,
            {"data": {"max_length": 128}, "micro_batch": None, "micro_tokens": 512, "batch": 32},
        ),
        ("cft", "deep", 1, "bf16", None, {}),
        ("reward", "deep", 2, "bf16", None, {"micro_batch": 4}),
        ("reward", "wide", 3, "fp32", None, {}),
    ]
]


@pytest.mark.cpu
@pytest.mark.parametrize(("recipe", "name", "stage", "dtype", "lora", "settings"), one_in_three(PEAKS))
def test_the_most_that_is_allocated(folders, tmp_path, recipe, name, stage, dtype, lora, settings):
    """Activations, logits, buckets and copies included."""
    folder = folders[name]
    phase = phase_in(folder, recipe, stage=stage, dtype=dtype, lora=lora, **settings)
    ((_, found),) = measured(folder, phase, tmp_path)
    longest, targets = lengths(folder, phase)
    where = setting_of(phase, dtype=dtype, on_gpu=False, longest=longest, targets=targets)
    shape = shape_of(str(folder / "model"))
    models = Models(shape.as_classifier if recipe == "reward" else shape)
    needs = team(phase, (), models, where)
    predicted = told(needs.host, *ALWAYS)
    print(f"{recipe} {name} {stage} {dtype} lora={bool(lora)}: {predicted / found:.3f}", dict(needs.host), found)
    assert found == pytest.approx(predicted, rel=TOLERANCE)


@pytest.mark.cpu
@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"attention": "eager"}])
def test_how_activations_are_kept_or_made(folders, tmp_path, how):
    folder = folders["deep"]
    phase = phase_in(folder, stage=2, dtype="bf16", micro_batch=8, batch=16)
    phase = phase.model_copy(update={"model": phase.model.model_copy(update=how)})
    ((_, found),) = measured(folder, phase, tmp_path)
    longest, targets = lengths(folder, phase)
    where = setting_of(phase, dtype="bf16", on_gpu=False, longest=longest, targets=targets)
    predicted = told(team(phase, (), Models(shape_of(str(folder / "model"))), where).host, *ALWAYS)
    print(f"sft deep 2 bf16 {how}: {predicted / found:.3f}")
    assert found == pytest.approx(predicted, rel=TOLERANCE)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("stage", "lora"),
    [(2, None), pytest.param(3, None, marks=pytest.mark.long), pytest.param(2, LORA, marks=pytest.mark.long)],
)
def test_ppo(folders, tmp_path, stage, lora):
    folder = folders["wide"]
    settings = {
        "reward": "tests.support.some_rewards:length", "critic": str(folder / "model"), "rollout_batch": 8,
        "response_tokens": 64, "ppo_epochs": 1, "data": {"max_length": 96},
    }  # fmt: skip
    phase = phase_in(folder, "ppo", stage=stage, dtype="bf16", lora=lora, **settings)
    ((_, found),) = measured(folder, phase, tmp_path)
    longest, _ = lengths(folder, phase)
    shape = shape_of(str(folder / "model"))
    where = setting_of(phase, dtype="bf16", on_gpu=False, longest=longest + 64, targets=64 / (longest + 64))
    needs = team(
        phase,
        ("policy", "reference", "critic", "reward"),
        Models(shape, shape.as_classifier),
        where,
    )
    # What stays as threads of transformers have loaded it is not counted.
    unseen = ("policy weights",) if lora else ("reference weights",) if stage == 2 else ()
    predicted = told(needs.host, *ALWAYS, *unseen)
    print(f"ppo {stage} lora={bool(lora)}: {predicted / found:.3f}", dict(needs.host), found)
    assert found == pytest.approx(predicted, rel=TOLERANCE)


def test_llama_2_7b_is_as_deepspeed_estimates_it():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    shape = shape_of("meta-llama/Llama-2-7b-hf")
    for workers in (8, 16, 64):
        phase = phase_of_7b(workers)
        needs = states(shape, setting_of(phase, dtype="bf16", on_gpu=True))
        _, expected, _ = estimate_zero3_model_states_mem_needs(
            shape.parameters, shape.largest, num_gpus_per_node=8, num_nodes=workers // 8, cpu_offload=False
        )
        own = ("gradient bucket", "small weights, whole")  # what it leaves out
        # A share is rounded up to whole numbers.
        assert 0 <= told(needs.device, *own) - expected <= 18


def phase_of_7b(workers):
    draft = {
        "recipe": "sft", "model": {"path": "meta-llama/Llama-2-7b-hf"}, "data": {"train": "rows.jsonl"}, "batch": 64,
        "sharding": {"stage": 3}, "resources": {"workers": workers},
    }  # fmt: skip
    return RECIPES["sft"].config.model_validate(draft)
