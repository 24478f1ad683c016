"""Tokens that were added to a tokenizer: refused where the embedding has no row for them, or the embedding grows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.support.training_fixtures import VOCABULARY, phase_of
from training.errors import InputError
from training.storage import open_storage

pytestmark = pytest.mark.cpu
LORA = {"rank": 4, "alpha": 8}
ADDED = ["<|look|>", "<|end_look|>"]


@pytest.fixture(scope="module", params=["untied", "tied"])
def added(request, tiny, tmp_path_factory):
    """A model whose tokenizer has two tokens more than its embedding has rows; beside it rows that use them."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("added") / request.param
    shutil.copytree(tiny / "model", folder / "model")
    if request.param == "tied":
        config = LlamaConfig.from_pretrained(tiny / "model", tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    assert len(tokenizer) == VOCABULARY + 2
    tokenizer.save_pretrained(folder / "model")
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()[:64]]
    with (folder / "rows.jsonl").open("w") as out:
        for row in rows:
            out.write(json.dumps({**row, "completion": f"<|look|>{row['completion']}<|end_look|>"}) + "\n")
    return folder


def settings(folder, **model):
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32", "resize_embedding": "auto", **model},
        "data": {"train": str(folder / "rows.jsonl")},
        "max_steps": 3,
    }


def grown_by_transformers(folder):
    """The model with rows for the new tokens, each the mean of the others."""
    import torch
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    lm.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with torch.no_grad():
        for weight in (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight):
            weight[VOCABULARY:] = weight[:VOCABULARY].mean(0)
    return lm


def logits(lm):
    import torch

    with torch.no_grad():
        return lm.eval()(torch.tensor([[5, 6, VOCABULARY, 8, VOCABULARY + 1, 10]])).logits.numpy()


def exported(hooks, phase, out, **how):
    from training.checkpoint.export import export

    export(hooks.last, open_storage(out), phase, **how)
    return out


def test_data_with_tokens_beyond_the_embedding_are_refused_by_name(added, tmp_path):
    from training.data.phase_data import open_stores

    phase = phase_of(added, "sft", **settings(added, resize_embedding="never"))
    with pytest.raises(InputError) as caught:
        open_stores(phase, tmp_path)
    message = str(caught.value)
    assert "<|look|> (300), <|end_look|> (301); the embedding has 300 rows, ids 0 to 299" in message
    assert "model.resize_embedding: auto" in message


def test_tokens_beyond_the_embedding_that_do_not_occur_are_a_note(added, tiny, tmp_path):
    from training.data import vocabulary
    from training.data.phase_data import open_stores

    phase = phase_of(
        added, "sft", **settings(added, resize_embedding="never") | {"data": {"train": str(tiny / "train.jsonl")}}
    )
    store = open_stores(phase, tmp_path).train
    (note,) = vocabulary.notes(phase, store.meta.tokenizer_rows)
    assert "no row for: <|look|> (300), <|end_look|> (301); none of them occurs" in note


def test_a_prompt_with_such_a_token_is_refused_in_words(added):
    from training.data.files import RowError
    from training.evaluation.evaluator import PromptCodec

    with pytest.raises(RowError, match=r"embedding has 300 rows and none for <\|look\|> \(300\)"):
        PromptCodec(str(added / "model")).ids("What is <|look|>?")


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_grown_embedding_is_learnt_and_the_folder_loads_alone(added, train, tmp_path, lora):
    """Also sharded, on two workers, and gone on with elsewhere; embedding and head are tied or not as they were."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from training.checkpoint.format import Manifest
    from training.models import loading as models

    how = settings(added, lora=lora)
    hooks = train(1, **how)
    rows = torch.tensor([VOCABULARY, VOCABULARY + 1])
    assert Manifest.read(hooks.last).parameters["model.embed_tokens.weight"][0] == VOCABULARY + 2
    assert any(
        "grows from 300 to 302 rows, for <|look|> (300), <|end_look|> (301)" in note for note in hooks.info.notes
    )

    if (added.name == "tied") == (lora is None):  # the other two combinations add nothing but time
        train(2, tmp_path / "on", stage=3, **how, stop_after=1, checkpoint={"every": 1})
        on = train(1, tmp_path / "on", stage=2, **how, checkpoint={"every": 1})
        assert on.losses == pytest.approx(hooks.losses[1:], rel=2e-5)

    phase = phase_of(added, "sft", **how)
    folder = exported(hooks, phase, tmp_path / "model")
    kind = AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM
    alone = kind.from_pretrained(folder, dtype=torch.float32)
    learnt = logits(alone)
    assert np.abs(learnt - logits(grown_by_transformers(added))).max() > 1e-3
    assert logits(models.for_inference(str(folder))) == pytest.approx(learnt, abs=1e-5)
    assert alone.get_input_embeddings().weight[rows].std(0).max() > 0  # no longer equal
    if lora is not None:
        merged = AutoModelForCausalLM.from_pretrained(
            exported(hooks, phase, tmp_path / "merged", merge=True), dtype=torch.float32
        )
        assert merged.config.vocab_size == VOCABULARY + 2
        assert logits(merged) == pytest.approx(learnt, abs=1e-5)
        on_adapter = train(2, stage=3, **settings(added, path=str(folder), lora=lora) | {"max_steps": 1})
        on_merged = train(1, **settings(added, path=str(tmp_path / "merged")) | {"max_steps": 1})
        assert on_adapter.losses == pytest.approx(on_merged.losses, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_new_rows_begin_as_the_mean_of_the_others(added, train, stage):
    import torch

    from training.data.order import Order
    from training.data.phase_data import open_stores

    hooks = train(2, stage=stage, **settings(added) | {"max_steps": 1})
    lm = grown_by_transformers(added).eval()
    first = hooks.rows[0]
    store = open_stores(phase_of(added, "sft", **settings(added)), added / "cache").train
    order = Order(store.source_sizes, seed=5, shuffle=True)
    total = count = 0
    for number in order.samples(0, 16).tolist():
        ids, targets = store[number]
        with torch.no_grad():
            out = lm(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(targets)
        total -= out[places - 1, ids[places]].sum().item()
        count += len(places)
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("added", ["tied"], indirect=True)
def test_policy_reference_and_critic_grow_alike(added, tiny, train):
    """With adapters each role trains an embedding of its own, so none shares a base;
    sharded or not, the curve is the same."""
    rows = [json.loads(line) for line in (tiny / "ppo.train.jsonl").read_text().splitlines()[:32]]
    prompts = added / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({**row, "prompt": f"<|look|>{row['prompt']}"}) + "\n" for row in rows))
    how = {
        **settings(added, lora=LORA), "data": {"train": str(prompts), "max_length": 64}, "recipe": "ppo",
        "reward": "tests.support.some_rewards:nines", "critic": str(added / "model"), "rollout_batch": 8, "batch": 8,
        "response_tokens": 6, "max_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    one, two = train(1, **how), train(2, stage=3, **how)
    assert one.rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    names = ("reward", "kl", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm")
    for first, second in zip(one.rows, two.rows, strict=True):
        assert [first[name] for name in names] == pytest.approx([second[name] for name in names], rel=1e-3, abs=1e-4)
