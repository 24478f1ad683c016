"""What a phase of training does beside its curve: evaluation, metrics, clipping, offload, the exported model."""

import json

import pytest

from tests.support.fork_group import ForkGroup
from tests.support.training_fixtures import sft_phase
from training.errors import Diverged, TrainingError
from training.group import results

pytestmark = pytest.mark.cpu

FP32 = 1e-6
"""Relative difference of a loss: see test_same_curve.py."""


def test_evaluation_is_the_loss_per_target_token_of_all_held_out_rows(train, tiny):
    data = {"eval": str(tiny / "eval.jsonl")}
    one = train(1, data=data, eval_every=4)
    three = train(3, stage=3, data=data, eval_every=4, micro_batch=2)
    evaluations = [[row["eval_loss"] for row in run.rows if "eval_loss" in row] for run in (one, three)]
    assert [row["step"] for row in one.rows if "eval_loss" in row] == [4, 8]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=FP32)


def test_an_evaluation_before_the_first_step_changes_nothing(train, tiny):
    data = {"eval": str(tiny / "eval.jsonl")}
    with_it, without = train(2, data=data, eval_on_start=True), train(2, data=data)
    assert [row["step"] for row in with_it.rows if "eval_loss" in row] == [0, 8]
    assert with_it.rows[0]["eval_loss"] > with_it.rows[-1]["eval_loss"]
    losses = [[row["loss"] for row in run.rows if "loss" in row] for run in (with_it, without)]
    assert losses[0] == losses[1]


def test_metrics_have_what_the_design_promises(train):
    hooks = train(2, stage=2)
    row = hooks.rows[0]
    assert len(hooks.paces_seen) == 2
    assert min(hooks.paces_seen) > 0
    assert row.keys() >= {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "samples", "step_s", "data_s",
        "tokens_per_s", "memory_gib", "workers",
    }  # fmt: skip
    assert (row["step"], row["samples"], row["workers"]) == (1, 16, 2)
    assert 0 < row["target_tokens"] < row["tokens"]
    assert 0 < row["data_s"] < row["step_s"]


def test_tokenized_data_that_a_worker_finds_damaged_are_made_anew_and_noted(train, tiny):
    whole = train(2, max_steps=2)
    tokens = tiny / "cache" / whole.info.data_hash / "tokens.bin"
    tokens.write_bytes(bytes(byte ^ 1 for byte in tokens.read_bytes()))
    again = train(2, max_steps=2)
    assert again.losses == whole.losses
    noted = [info for kind, info in again.events if kind == "data_damaged"]
    assert [info["rank"] for info in noted] == [0]
    assert noted[0]["finding"].startswith(f"{tokens}: the content has changed")
    assert "data_damaged" not in [kind for kind, _ in whole.events]


def test_a_smaller_last_batch_ends_the_epoch(train):
    run = train(1, max_steps=None, epochs=1)
    assert [row["samples"] for row in run.rows] == [16] * 16 + [4]


def test_a_loss_that_is_not_a_number_ends_the_training(train, tmp_path):
    with pytest.raises(
        Diverged, match=r"step \d+: the loss is (nan|inf).*; the batch: .*train.jsonl:\d+.* and 11 more"
    ):
        train(2, stage=2, learning_rate=1e30, clip=None, checkpoints=tmp_path)
    assert list(tmp_path.glob("step-*")) == [], "weights that are not numbers were saved"


def test_an_error_in_the_model_names_the_step_and_the_rows(tiny):
    phase = sft_phase(tiny, micro_batch=4)
    with ForkGroup(1, "tests.support.recording_trainer:FailingTrainer", phase, str(tiny / "cache")) as group:
        results(group.call("setup"))
        (rows,) = results(group.call("second_micro_batch"))
        with pytest.raises(TrainingError) as caught:
            results(group.call("train", 0, 1))
    assert len(rows) == 4
    assert caught.value.__cause__.__notes__ == [f"in step 1, with the rows {', '.join(rows)}"]
    assert all(row.startswith(f"{tiny}/train.jsonl:") for row in rows)


def test_the_exported_model_is_the_trained_one(train, tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.checkpoint.export import export
    from training.checkpoint.format import Reader
    from training.storage import open_storage

    run = train(2, stage=3)
    out = tmp_path / "model"
    export(run.last, open_storage(out), sft_phase(tiny), shard_bytes=50_000)
    assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == 21
    model = AutoModelForCausalLM.from_pretrained(out)
    reader = Reader(run.last)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(reader.whole(name))), name
    ids = AutoTokenizer.from_pretrained(out)("Q: 1 + 2 = ", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_small_clip_is_the_same_at_every_stage(train, stage):
    expected = train(1, stage=1, clip=0.01).losses
    assert train(1, stage=stage, clip=0.01).losses == pytest.approx(expected, rel=FP32)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_states_in_host_memory_change_nothing_and_are_saved_too(train, tmp_path, stage):
    settings = {"sharding": {"stage": stage, "offload": "cpu"}}
    first = train(2, checkpoints=tmp_path, stop_after=4, **settings)
    second = train(2, checkpoints=tmp_path, **settings)
    assert first.losses + second.losses == pytest.approx(train(1).losses, rel=FP32)
