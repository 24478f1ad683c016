"""What the recipes come to: pretraining on documents, reward models
that score alike elsewhere, evaluation by answers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from tests.support.training_fixtures import phase_of
from training.config import CFT, Reward
from training.errors import InputError
from training.recipes import RECIPES
from training.storage import open_storage

pytestmark = pytest.mark.cpu


def exported(tiny, hooks, out, recipe, **settings):
    from training.checkpoint.export import export

    export(hooks.last, open_storage(out), phase_of(tiny, recipe, **settings))
    return out


# ── reward ──


@pytest.fixture(scope="module")
def reward_model(tiny, train, tmp_path_factory):
    """The hooks of a run that has learnt its pairs, and the folder it ended with."""
    hooks = train(
        2, recipe="reward", stage=3, max_steps=40, data={"eval": str(tiny / "reward.eval.jsonl")}, dtype="fp32"
    )
    return hooks, exported(tiny, hooks, tmp_path_factory.mktemp("reward") / "model", "reward")


def test_it_learns_to_rank_and_measures_it(reward_model):
    hooks, _ = reward_model
    last = hooks.rows[-1]
    assert last["eval_accuracy"] > 0.9
    assert last["eval_margin"] > 0.5
    assert last["eval_reward_std"] > 0
    first = hooks.rows[0]
    assert {"loss", "accuracy", "margin", "reward_mean", "reward_std"} <= first.keys()


def test_the_exported_model_scores_as_it_did(tiny, reward_model):
    """AutoModelForSequenceClassification, batched and padded, gives the rewards that the evaluation measured."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from training.data.phase_data import open_stores
    from training.data.render import sides_of

    hooks, folder = reward_model
    lm = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert lm.config.num_labels == 1
    assert lm.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    store = open_stores(phase_of(tiny, "reward", data={"eval": str(tiny / "reward.eval.jsonl")}), tiny / "cache").eval
    pairs = [sides_of(*store[number]) for number in range(len(store))]
    with torch.no_grad():
        chosen, rejected = (
            lm(**tokenizer.pad({"input_ids": [side.tolist() for side in sides]}, return_tensors="pt")).logits[:, 0]
            for sides in zip(*pairs, strict=True)
        )
    last = hooks.rows[-1]
    assert float((chosen > rejected).float().mean()) == pytest.approx(last["eval_accuracy"])
    assert float((chosen - rejected).mean()) == pytest.approx(last["eval_margin"], rel=1e-5)
    both = torch.cat([chosen, rejected])
    assert float(both.mean()) == pytest.approx(last["eval_reward_mean"], abs=1e-5)
    assert float(both.std(correction=0)) == pytest.approx(last["eval_reward_std"], rel=1e-4)
    info = json.loads((folder / "muster.json").read_text())
    assert info["reward"] == {"mean": last["eval_reward_mean"], "std": last["eval_reward_std"]}


def test_the_judge_scores_as_the_model_does(tiny, reward_model):
    from training.evaluation.evaluator import RewardScorer

    hooks, folder = reward_model
    rows = [json.loads(line) for line in (tiny / "reward.eval.jsonl").open()]
    judge = RewardScorer(str(folder))
    assert not judge.chat
    chosen, rejected = (
        judge.rewards([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected")
    )
    margin = sum(a - b for a, b in zip(chosen, rejected, strict=True)) / len(rows)
    assert margin == pytest.approx(hooks.rows[-1]["eval_margin"], rel=1e-5)
    with pytest.raises(InputError, match="is no reward model"):
        RewardScorer(str(tiny / "model"))


def test_pairs_of_conversations_are_judged_as_conversations(tiny, train, tmp_path):
    """Their columns are those of plain pairs; that they are conversations shows in what the columns hold."""
    from training.evaluation.evaluator import RewardScorer

    rows = [json.loads(line) for line in (tiny / "reward.train.jsonl").open()]
    chats = [
        {side: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[side]}" for side in ("chosen", "rejected")} for r in rows
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    data = {"train": str(tmp_path / "chats.jsonl")}
    hooks = train(1, recipe="reward", max_steps=1, data=data)
    folder = exported(tiny, hooks, tmp_path / "model", "reward", data=data)
    assert json.loads((folder / "muster.json").read_text())["questions"] == "chat"
    assert RewardScorer(str(folder)).chat


def test_a_reward_model_may_be_trained_on(tiny, train, reward_model):
    hooks, folder = reward_model
    on = train(1, recipe="reward", model={"path": str(folder), "dtype": "fp32"}, max_steps=1)
    assert on.rows[0]["accuracy"] > 0.8
    assert hooks.rows[0]["accuracy"] < 0.8


@pytest.mark.parametrize("stage", [0, 3])
def test_the_head_of_a_new_reward_model_hangs_on_the_seed(tiny, train, stage):
    from training.checkpoint.format import Reader

    first = train(2, recipe="reward", stage=stage, max_steps=1, learning_rate=1e-30)
    head = Reader(first.last).whole("score.weight")
    assert head.shape == (1, 48)
    # 48 draws from a normal distribution: their standard deviation is within half of its own.
    assert head.std() == pytest.approx(1 / math.sqrt(49), rel=0.5)
    other = train(1, recipe="reward", max_steps=1, learning_rate=1e-30, seed=6)
    assert (Reader(other.last).whole("score.weight") != head).all()
    again = train(1, recipe="reward", stage=2, max_steps=1, learning_rate=1e-30)
    assert (Reader(again.last).whole("score.weight") == head).all()


def test_cut_answers_are_refused():
    with pytest.raises(ValueError, match="judged by its beginning"):
        Reward.model_validate(
            {"recipe": "reward", "model": {"path": "m"}, "data": {"train": "d", "overlong": "truncate"}}
        )


# ── pretrain ──


def test_documents_of_text_files_are_learnt_whole(tiny, train, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("one and two and three " * 60)
    (tmp_path / "corpus/b.md").write_text("# four\n")
    hooks = train(
        1, recipe="pretrain", data={"train": str(tmp_path / "corpus"), "max_length": 32}, epochs=1, max_steps=None
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    texts = [(tmp_path / "corpus" / name).read_text() for name in ("a.txt", "b.md")]
    count = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    learnt = sum(row["target_tokens"] for row in hooks.rows)
    assert learnt == count  # every token but the first, and the EOS, of each document
    assert "1 of 2 samples are longer than 32 tokens and were split" in hooks.info.notes


def test_it_goes_on_in_the_middle_of_the_corpus(tiny, train, tmp_path):
    whole = train(2, recipe="pretrain", data={"max_length": 64}, checkpoint={"every": 3})
    train(2, tmp_path, recipe="pretrain", data={"max_length": 64}, checkpoint={"every": 3}, stop_after=3)
    on = train(2, tmp_path, recipe="pretrain", data={"max_length": 64}, checkpoint={"every": 3})
    assert on.first == 3
    assert on.losses == whole.losses[3:]


# ── cft ──


def test_the_defaults_are_the_papers():
    phase = CFT.model_validate(
        {"recipe": "cft", "model": {"path": "m"}, "data": {"train": "d"}, "schedule": {"name": "cosine"}}
    )
    assert (phase.learning_rate, phase.batch, phase.data.max_length) == (5e-6, 512, 2048)
    assert (phase.schedule.name, phase.schedule.warmup, phase.schedule.floor) == ("cosine", 0.1, 0.0)


def test_the_loss_is_on_the_critique_alone(tiny):
    from training.data.phase_data import open_stores
    from training.data.render import Renderer, load_tokenizer

    phase = phase_of(tiny, "cft")
    store = open_stores(phase, tiny / "cache").train
    renderer = Renderer(load_tokenizer(str(tiny / "model")))
    rows = [json.loads(line) for line in (tiny / "cft.train.jsonl").open()]
    for number in range(20):
        ids, targets = store[number]
        assert renderer.text(ids[targets].tolist()) == rows[number]["critique"]


# ── evaluation by answers ──


@pytest.fixture(scope="module")
def questions(tiny):
    return {"data": str(tiny / "eval.jsonl"), "limit": 12, "max_new_tokens": 12}


@pytest.mark.parametrize("stage", [2, 3])
def test_answers_are_measured_while_training_and_the_best_is_what_it_ends_with(tiny, train, questions, stage):
    from training.checkpoint.format import Manifest

    verdicts = {"verdicts": str(tiny / "cft.eval.jsonl")}
    hooks = train(
        2, recipe="cft", stage=stage, eval={**questions, **verdicts}, eval_every=2, max_steps=8,
        checkpoint={"every": 2, "keep": 1, "best": {"metric": "eval_accuracy"}},
    )  # fmt: skip
    evaluations = [row for row in hooks.rows if "eval_accuracy" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6, 8]
    assert all({"eval_accuracy_low", "eval_verdict_accuracy", "eval_tokens_per_s"} <= row.keys() for row in evaluations)
    assert len(hooks.answered[8, ""]) == 12
    assert len(hooks.answered[8, "verdict_"]) == 12
    best = max(evaluations, key=lambda row: (row["eval_accuracy"], -row["step"]))
    assert Manifest.read(hooks.last).step == best["step"]


def test_the_smallest_loss_is_the_best_and_the_largest_accuracy():
    from training.config import Best

    assert Best(metric="eval_loss").smaller_is_better
    assert not Best(metric="eval_accuracy").smaller_is_better
    assert not Best(metric="eval_loss", mode="max").smaller_is_better


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ppo"])  # which has no loss on held-out rows
def test_a_metric_that_is_not_measured_is_refused(name):
    draft = {
        "recipe": name, "model": {"path": "m"}, "data": {"train": "d", "eval": "e"},
        "checkpoint": {"best": {"metric": "eval_nonsense"}},
    }  # fmt: skip
    with pytest.raises(ValueError, match="eval_nonsense is not measured; this phase measures eval_loss"):
        RECIPES[name].config.model_validate(draft)


def test_a_reward_models_padding_is_no_token_that_sequences_end_with(tiny, train, tmp_path):
    """One token is all: begin, end, unknown. transformers reads the score where the export says,
    alone and in padded batches."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from training.checkpoint.export import export
    from training.data.phase_data import open_stores
    from training.data.render import sides_of

    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(dict.fromkeys(("bos_token", "unk_token", "pad_token"), tokenizer.eos_token))
    tokenizer.save_pretrained(folder)
    model = {"model": {"path": str(folder), "dtype": "fp32"}}
    hooks = train(1, recipe="reward", max_steps=1, batch=8, learning_rate=1e-9, data={"shuffle": False}, **model)
    export(hooks.last, open_storage(tmp_path / "out"), phase_of(tiny, "reward", **model))
    lm = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert lm.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    store = open_stores(phase_of(tiny, "reward", **model), tmp_path).train
    sequences = [side.tolist() for number in range(8) for side in sides_of(*store[number])]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in sequences)
    with torch.no_grad():
        alone = [lm(torch.tensor([ids])).logits.item() for ids in sequences]
        for side in ("left", "right"):
            batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt", padding_side=side)
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            assert lm(**batch).logits[:, 0].tolist() == pytest.approx(alone, abs=1e-5)
    assert np.mean(alone) == pytest.approx(hooks.rows[0]["reward_mean"], abs=1e-5)
