"""What is known of a model, and which way its samples take for it: pure decisions,
and the files that results are kept in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from training.config import PPO, SFT, Model, Reward
from training.data.batching import SDPA_VARLEN, limits_for, partition_batch
from training.errors import InputError
from training.estimate import model_traits
from training.estimate.model_traits import Kernel, Rows, Traits

GOOD = Kernel(exists=True, right=True, packs=True, pads=True, trees=True)
LEAKS = replace(GOOD, packs=False)
NONE = Kernel(exists=False)
LLAMA = Traits(
    architecture="LlamaForCausalLM",
    body=True,
    last_mlp=True,
    generation="batched",
    kernels={"eager": GOOD, "sdpa": GOOD, SDPA_VARLEN: GOOD, "flash_attention_2": Kernel(exists=True, right=True)},
)
GEMMA2 = replace(LLAMA, architecture="Gemma2ForCausalLM", kernels={"eager": GOOD, "sdpa": NONE, SDPA_VARLEN: NONE})
OPT = replace(LLAMA, architecture="OPTForCausalLM", kernels=dict.fromkeys(("eager", "sdpa", SDPA_VARLEN), LEAKS))
STRANGE = Traits(architecture="OwnForCausalLM", unknown="ValueError: no sizes")


def phase(kind: Any = SFT, **settings: Any) -> Any:
    model = {"path": "m", **settings.pop("model", {})}
    data = {"train": "rows.jsonl", **settings.pop("data", {})}
    return kind(recipe="reward" if kind is Reward else "sft", model=model, data=data, epochs=1, **settings)


@pytest.mark.parametrize(
    ("known", "settings", "device", "flash", "expected"),
    [
        (LLAMA, {}, "cpu", False, SDPA_VARLEN),
        (LLAMA, {"compile": True}, "cpu", False, "sdpa"),
        (LLAMA, {}, "cuda", False, "sdpa"),
        (LLAMA, {}, "cuda", True, "flash_attention_2"),
        (LLAMA, {"attention": "sdpa"}, "cpu", False, "sdpa"),
        (LLAMA, {"attention": SDPA_VARLEN}, "cuda", False, SDPA_VARLEN),
        (GEMMA2, {}, "cpu", False, "eager"),
        (GEMMA2, {}, "cuda", True, "eager"),
        (STRANGE, {}, "cuda", True, "eager"),
        (STRANGE, {"attention": "eager"}, "cpu", False, "eager"),
    ],
)
def test_which_attention_kernel_a_model_gets(known, settings, device, flash, expected):
    assert model_traits.attention_of(Model(path="m", **settings), known, device, flash=flash) == expected


@pytest.mark.parametrize(
    ("known", "attention", "message"),
    [
        (
            GEMMA2,
            "sdpa",
            "sdpa attention for Gemma2ForCausalLM is not supported by transformers; use one of eager, or leave it out",
        ),
        (
            replace(LLAMA, kernels={**LLAMA.kernels, "sdpa": Kernel(exists=True)}),
            "sdpa",
            "computes other logits than eager attention",
        ),
        (STRANGE, "sdpa", "OwnForCausalLM could not be examined (ValueError: no sizes)"),
    ],
)
def test_a_kernel_that_a_model_does_not_have_is_refused_by_the_setting(known, attention, message):
    with pytest.raises(InputError) as refused:
        model_traits.attention_of(Model(path="m", attention=attention), known, "cpu")
    (problem,) = refused.value.problems
    assert problem.what == "model.attention"
    assert message in problem.message


@pytest.mark.parametrize(
    ("known", "attention", "longest", "expected"),
    [
        (LLAMA, SDPA_VARLEN, 4096, Rows(packs=True, same_length_above=None)),
        (LLAMA, "flash_attention_2", 4096, Rows(packs=True, same_length_above=None)),
        (OPT, "sdpa", 100, Rows(packs=False, same_length_above=None)),
        (OPT, "flash_attention_2", 100, Rows(packs=False, same_length_above=None)),
        (STRANGE, "eager", 100, Rows(packs=False, same_length_above=0)),
        (replace(LLAMA, rotary_limit=2048), SDPA_VARLEN, 2048, Rows(packs=True, same_length_above=None)),
        (replace(LLAMA, rotary_limit=2048), SDPA_VARLEN, 2049, Rows(packs=False, same_length_above=2048)),
    ],
)
def test_how_samples_share_micro_batches(known, attention, longest, expected):
    assert model_traits.rows_of(known, attention, longest) == expected


def test_rows_of_unlike_lengths_are_kept_apart_above_a_length():
    lengths = [5, 9, 9, 12, 12, 30, 30, 31]
    limits = limits_for(phase(), 31, "cpu", "sdpa", packs=False, same_length_above=10)
    (turns,) = partition_batch(lengths, 1, limits)
    assert sorted(sorted(lengths[i] for row in rows for i in row) for rows in turns) == [
        [5, 9, 9],
        [12, 12],
        [30, 30],
        [31],
    ]


@pytest.mark.parametrize(
    ("kind", "known", "key", "message"),
    [
        (SFT, replace(LLAMA, causal=False), "model.path", "sees later ones"),
        (Reward, replace(LLAMA, classifier=False), "model.path", "no sequence classifier"),
        (Reward, replace(LLAMA, rotary_limit=64), "data.max_length", "set data.max_length to 64 or less"),
    ],
)
def test_what_cannot_be_learnt_with_a_model_is_refused(kind, known, key, message):
    with pytest.raises(InputError) as refused:
        model_traits.refuse(phase(kind), known, "sdpa", 100)
    (problem,) = refused.value.problems
    assert problem.what == key
    assert message in problem.message


def test_another_way_is_told_with_its_reason_and_its_setting():
    assert not list(model_traits.notes(phase(), LLAMA, SDPA_VARLEN, 100))
    (note,) = model_traits.notes(phase(), OPT, "sdpa", 100)
    assert note.startswith("samples of OPTForCausalLM that share a row see each other")
    assert "data.pack" in note
    assert not list(model_traits.notes(phase(data={"pack": False}), OPT, "sdpa", 100))
    (note,) = model_traits.notes(phase(), GEMMA2, "eager", 100)
    assert "model.attention" in note
    (note,) = model_traits.notes(phase(), STRANGE, "eager", 100)
    assert "no small copy of OwnForCausalLM" in note


def test_continuous_batching_is_for_models_that_keep_packed_samples_apart():
    assert LLAMA.batches_continuously(SDPA_VARLEN, 100)
    assert LLAMA.batches_continuously("flash_attention_2", 100)
    assert GEMMA2.batches_continuously("eager", 100)
    unfit = [OPT, STRANGE, replace(LLAMA, generation="alone"), replace(LLAMA, rotary_limit=64)]
    assert not any(known.batches_continuously("eager", 100) for known in unfit)
    ppo = PPO(
        recipe="ppo",
        model={"path": "m"},
        data={"train": "p.jsonl"},
        epochs=1,
        reward="r",
        batch=4,
        rollout_batch=4,
        generation="continuous",
        resources={"gpus_per_worker": 1},
    )
    assert "continuous batching would change what OPTForCausalLM writes" in next(
        model_traits.notes(ppo, OPT, "sdpa", 100)
    )
    assert not list(model_traits.notes(ppo, LLAMA, "sdpa", 100))


def test_results_are_found_again_and_go_to_workers_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(model_traits, "_known", {})
    model_traits.remember("key", OPT)
    model_traits.pass_on(["key", "unknown"])
    monkeypatch.setattr(model_traits, "_known", {})
    assert model_traits.known("key") == OPT  # from the file
    monkeypatch.setenv("MUSTER_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(model_traits, "_known", {})
    assert model_traits.known("key") == OPT  # from the one who drives the run
    monkeypatch.delenv(model_traits.PASSED_ON)
    monkeypatch.setattr(model_traits, "_known", {})
    assert model_traits.known("key") is None


def test_the_key_is_of_what_decides_and_of_nothing_else(tmp_path):
    config = {"model_type": "opt", "hidden_size": 64, "architectures": ["OPTForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    key = model_traits.key_in(str(tmp_path))
    assert (
        model_traits.key_of({**config, "architectures": ["OPTForSequenceClassification"], "dtype": "bfloat16"}) == key
    )
    assert model_traits.key_of({**config, "hidden_size": 128}) != key
    (tmp_path / "modeling.py").write_text("x = 1")
    assert model_traits.key_in(str(tmp_path)) == key  # code that is not run
    assert model_traits.key_in(str(tmp_path), trust_remote_code=True) != key
    assert model_traits.key_in(str(tmp_path / "nowhere")) is None
