"""Training itself: against a hand-written loop, over machines and ZeRO stages, and through an interruption."""

import json

import numpy as np
import pytest

from tests.training_fixtures import sft_phase

pytestmark = pytest.mark.cpu

FP32 = 1e-5
"""Relative difference of a loss: sums of fp32 in another order differ by a few units in the last place (6e-8) and
the difference grows a little with every step."""


@pytest.fixture(scope="module")
def plain(tiny):
    """Losses and gradient norms of a loop in plain torch: no DeepSpeed, no packing, no padding, one sample at a time."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from training.data.order import Order
    from training.data.stores import open_stores
    from training.schedule import learning_rate

    phase = sft_phase(tiny)
    store = open_stores(phase, tiny / "cache").train
    order = Order(store.source_sizes, seed=phase.seed)
    model = AutoModelForCausalLM.from_pretrained(phase.model.path, dtype=torch.float32)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(1, 9):
        samples = order.samples((step - 1) * 16, step * 16)
        targets = sum(int(store.target_counts[i]) for i in samples)
        total = 0.0
        for i in samples:
            ids, mask = (torch.from_numpy(a) for a in store[int(i)])
            logits = model(ids[None], use_cache=False).logits[0]
            loss = cross_entropy(logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum") / targets
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(3e-3, phase.schedule, step, 8)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def assert_same_curve(got, expected, tolerance=FP32):
    difference = np.array(got) / np.array(expected) - 1
    assert np.abs(difference).max() <= tolerance
    # A dropped or doubled micro-batch shows as a drift to one side long before it shows in the largest difference.
    assert abs(difference.mean()) <= tolerance / 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_curve_is_that_of_a_plain_loop_at_any_stage_and_number_of_workers(train, plain, stage, workers):
    run = train(workers, stage=stage)
    losses, norms = plain
    assert_same_curve(run.losses, losses)
    assert_same_curve([row["grad_norm"] for row in run.rows if "loss" in row], norms, 1e-4)


def test_zero_1_and_2_give_equal_curves_bit_for_bit(train):
    # They do the same sums in the same order. ZeRO-0 runs Adam over other stretches of memory, and ZeRO-3 brings a matrix
    # product of its own for the gradients of weights, so those agree to rounding.
    assert train(2, stage=1).losses == train(2, stage=2).losses


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"pack": False}},
        {"micro_batch": 1},
        {"micro_batch": 3, "data": {"pack": False}},
        {"micro_tokens": 64, "data": {"max_length": 64}},
        {"model_gradient_checkpointing": True},
    ],
    ids=["padded", "one by one", "three by three, padded", "64 tokens at a time", "gradient checkpointing"],
)
@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_the_curve_does_not_depend_on_how_the_batch_is_cut(train, plain, tiny, settings, workers, stage):
    settings = dict(settings)
    if settings.pop("model_gradient_checkpointing", False):
        model = {"path": str(tiny / "model"), "dtype": "fp32", "gradient_checkpointing": True}
        settings["model"] = model
    assert_same_curve(train(workers, stage=stage, **settings).losses, plain[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_near_fp32(train, plain, stage):
    # bf16 keeps 8 bits: a product is off by up to 2^-9, and so, relative to its size, is a loss that averages many.
    losses = np.array(train(2, stage=stage, dtype="bf16").losses)
    difference = losses / np.array(plain[0]) - 1
    assert 0 < np.abs(difference).max() < 2 * 2**-8
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_interrupted_run_goes_on_bit_for_bit(train, tmp_path, workers, stage, dtype):
    settings = {"stage": stage, "dtype": dtype, "checkpoint": {"every": 3}}
    whole = train(workers, **settings)
    first = train(workers, checkpoints=tmp_path, stop_after=4, **settings)
    assert first.last is None, "it was asked to stop"
    second = train(workers, checkpoints=tmp_path, **settings)
    assert second.first == len(first.losses)
    assert first.losses + second.losses == whole.losses
    assert _weights(second) == _weights(whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 2), (3, 3)), ((2, 3), (1, 0)), ((1, 0), (2, 1)), ((3, 1), (2, 2))],
    ids=str,
)
def test_a_run_goes_on_at_another_number_of_workers_and_stage(train, plain, tmp_path, before, after):
    first = train(before[0], stage=before[1], checkpoints=tmp_path, stop_after=4)
    second = train(after[0], stage=after[1], checkpoints=tmp_path)
    assert_same_curve(first.losses + second.losses, plain[0])


def _weights(run):
    from training.checkpoint import Reader

    reader = Reader(run.last)
    return {name: reader.whole(name).tobytes() for name in reader.manifest.parameters}


def test_evaluation_is_the_loss_per_target_token_of_all_held_out_rows(train, tiny):
    data = {"eval": str(tiny / "eval.jsonl")}
    one = train(1, data=data, eval_every=4)
    three = train(3, stage=3, data=data, eval_every=4, micro_batch=2)
    evaluations = [[row["eval_loss"] for row in run.rows if "eval_loss" in row] for run in (one, three)]
    assert [row["step"] for row in one.rows if "eval_loss" in row] == [4, 8]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=FP32)


def test_metrics_have_what_the_design_promises(train):
    row = train(2, stage=2).rows[0]
    assert row.keys() >= {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "samples", "step_s", "tokens_per_s",
        "memory_gib", "workers",
    }  # fmt: skip
    assert (row["step"], row["samples"], row["workers"]) == (1, 16, 2)
    assert 0 < row["target_tokens"] < row["tokens"]


def test_a_smaller_last_batch_ends_the_epoch(train):
    run = train(1, max_steps=None, epochs=1)
    assert [row["samples"] for row in run.rows] == [16] * 16 + [4]


def test_a_loss_that_is_not_a_number_ends_the_training(train, tmp_path):
    from training.errors import TrainingError

    with pytest.raises(TrainingError, match=r"step \d+: the loss is (nan|inf)"):
        train(2, stage=2, learning_rate=1e30, clip=None, checkpoints=tmp_path)
    assert list(tmp_path.glob("step-*")) == [], "weights that are not numbers were saved"


def test_the_exported_model_is_the_trained_one(train, tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.checkpoint import Reader
    from training.export import export
    from training.storage import place

    run = train(2, stage=3)
    out = tmp_path / "model"
    export(run.last, place(out), sft_phase(tiny), shard_bytes=50_000)
    assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == 21
    model = AutoModelForCausalLM.from_pretrained(out)
    reader = Reader(run.last)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(reader.whole(name))), name
    ids = AutoTokenizer.from_pretrained(out)("Q: 1 + 2 = ", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_small_clip_is_the_same_at_every_stage(train, plain, stage):
    expected = train(1, stage=1, clip=0.01).losses
    assert_same_curve(train(1, stage=stage, clip=0.01).losses, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_states_in_host_memory_change_nothing_and_are_saved_too(train, plain, tmp_path, stage):
    settings = {"sharding": {"stage": stage, "offload": "cpu"}}
    first = train(2, checkpoints=tmp_path, stop_after=4, **settings)
    second = train(2, checkpoints=tmp_path, **settings)
    assert_same_curve(first.losses + second.losses, plain[0])
