"""Same job, same curve: one canonical run a recipe, held against a loop in plain torch whatever the machines and the cutting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.fork_group import in_a_process
from tests.training_fixtures import Recorder, sft_phase
from training.recipes import RECIPES

pytestmark = pytest.mark.cpu

STEPS, BATCH, RATE = 50, 16, 3e-3
"""Three epochs of 260 samples, the last batch of no epoch ending with it."""
EVAL_EVERY = 20

FP32_STEP = 1e-6
"""Largest relative difference of a loss. A loss is a sum of some 200 fp32 terms, added up in another order: that is worth a few
units in the last place (6e-8), and what it does to the weights is as small again. Measured over this table: 3.2e-7."""
FP32_DRIFT = 1e-7
"""Largest mean of the relative differences. Rounding has no preferred side: over 50 steps its mean is about the spread (1e-7)
over the root of 50. A sample counted twice or a mean of means leans to one side at every step. Measured: 3e-8."""
FP32_NORM = 3e-6
"""Largest relative difference of a gradient norm: terms of both signs were added up before it is taken. Measured: 5.5e-7."""
FP32_WEIGHTS = 1e-5
"""Largest difference of a weight (they are of size 0.1, and each moves by up to RATE a step). Where a gradient is so small that it
is mostly rounding, Adam's division by its size makes that rounding count. Measured: 1.8e-6."""
BF16_STEP, BF16_DRIFT = 2**-7, 2**-9
"""bf16 keeps 8 bits: a rounding errs by up to 2^-9 of the value. On its way to the loss an activation is rounded some 16 times
(8 a layer, 2 layers), with random signs: 4 x 2^-9 = 2^-7 at the most. The mean over 50 steps averages that out; what remains is
the rounding of the weights themselves, once: 2^-9. Measured: 2.8e-3 and 8e-4."""


@dataclass
class Curve:
    """What a run came to."""

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    weights: dict[str, np.ndarray] = field(repr=False)


def sft(tiny, **settings):
    """The canonical phase of SFT, with what training has: clipping, decay on and off, warm-up and decay, several epochs."""
    data = {"eval": str(tiny / "eval.jsonl"), **settings.pop("data", {})}
    return sft_phase(
        tiny, max_steps=STEPS, batch=BATCH, learning_rate=RATE, eval_every=EVAL_EVERY, data=data, **settings
    )


def plain_sft(tiny) -> Curve:
    """The same in plain torch: no DeepSpeed, no packing, no padding, no micro-batches, one sample at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from training.data.order import Order
    from training.data.stores import open_stores
    from training.schedule import learning_rate

    phase = sft(tiny)
    stores = open_stores(phase, tiny / "cache")
    order = Order(stores.train.source_sizes, seed=phase.seed)
    model = AutoModelForCausalLM.from_pretrained(phase.model.path, dtype=torch.float32)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, evaluations = [], [], []
    for step in range(1, STEPS + 1):
        losses.append(
            _sum_of_losses(model, stores.train, order.samples((step - 1) * BATCH, step * BATCH), backward=True)
        )
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(RATE, phase.schedule, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVAL_EVERY == 0 or step == STEPS:
            evaluations.append(_sum_of_losses(model, stores.eval, range(len(stores.eval)), backward=False))
    return Curve(losses, norms, evaluations, {name: p.detach().numpy() for name, p in model.named_parameters()})


def _sum_of_losses(model, store, samples, *, backward: bool) -> float:
    """Loss per target token over some samples."""
    import torch
    from torch.nn.functional import cross_entropy

    targets, total = sum(int(store.target_counts[i]) for i in samples), 0.0
    for i in samples:
        ids, mask = (torch.from_numpy(a) for a in store[int(i)])
        with torch.set_grad_enabled(backward):
            logits = model(ids[None], use_cache=False).logits[0]
            loss = cross_entropy(logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum") / targets
        if backward:
            loss.backward()
        total += loss.item()
    return total


@dataclass(frozen=True)
class Canonical:
    """A recipe's canonical run, and what it must come to."""

    phase: Callable
    plain: Callable


CANONICAL = {"sft": Canonical(sft, plain_sft)}
"""Every recipe joins this table, and with it all of the tests below."""


def test_every_recipe_has_a_canonical_run():
    assert CANONICAL.keys() == RECIPES.keys()


@pytest.fixture(scope="module", params=CANONICAL)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def plain(recipe, tiny) -> Curve:
    return CANONICAL[recipe].plain(tiny)


@pytest.fixture(scope="module")
def run(recipe, tiny, tmp_path_factory):
    """run(workers, stage, **settings) -> Curve, remembered for whoever asks again."""
    from tests.fork_group import ForkGroup
    from training.recipes import resolve

    known: dict[str, Curve] = {}

    def run(workers: int, stage: int, **settings) -> Curve:
        key = f"{workers} {stage} {settings}"
        if key not in known:
            phase = CANONICAL[recipe].phase(tiny, workers=workers, stage=stage, **settings)
            hooks = Recorder(tmp_path_factory.mktemp("checkpoints"))
            with ForkGroup(workers, RECIPES[recipe].roles["trainer"], phase, str(tiny / "cache")) as group:
                last = resolve(RECIPES[recipe].run)(phase, {"trainer": group}, hooks)
            known[key] = curve_of(hooks, last)
        return known[key]

    return run


def curve_of(hooks: Recorder, last) -> Curve:
    from training.checkpoint import Reader

    reader = Reader(last)
    weights = {name: reader.whole(name) for name in reader.manifest.parameters}
    columns = ([row[name] for row in hooks.rows if name in row] for name in ("loss", "grad_norm", "eval_loss"))
    return Curve(*columns, weights)


def assert_same_losses(got, expected, step=FP32_STEP, drift=FP32_DRIFT):
    difference = np.array(got) / np.array(expected) - 1
    assert np.abs(difference).max() <= step
    assert abs(difference.mean()) <= drift


def assert_same(curve: Curve, expected: Curve):
    assert len(curve.losses) == STEPS
    assert_same_losses(curve.losses, expected.losses)
    assert curve.norms == pytest.approx(expected.norms, rel=FP32_NORM)
    assert_same_losses(curve.evaluations, expected.evaluations, drift=FP32_STEP)  # too few for a mean
    assert curve.weights.keys() == expected.weights.keys()
    furthest = {name: np.abs(values - expected.weights[name]).max() for name, values in curve.weights.items()}
    assert max(furthest.values()) <= FP32_WEIGHTS, max(furthest, key=furthest.get)


def test_the_checks_can_fail():
    rng = np.random.default_rng(0)
    expected = np.linspace(6, 0.5, STEPS)
    rounding = 1 + 1e-7 * rng.standard_normal(STEPS)
    assert_same_losses(expected * rounding, expected)
    with pytest.raises(AssertionError):
        assert_same_losses(expected * rounding * (1 + 2e-7), expected)  # far below the limit of a step, and one-sided
    with pytest.raises(AssertionError):
        assert_same_losses(np.where(np.arange(STEPS) == 30, expected * 1.00001, expected), expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_and_any_stage(run, plain, workers, stage):
    assert_same(run(workers, stage), plain)


CUTS = {
    "padded": {"data": {"pack": False}},
    "one by one": {"micro_batch": 1},
    "three by three, padded": {"micro_batch": 3, "data": {"pack": False}},
    "64 tokens at a time": {"micro_tokens": 64, "data": {"max_length": 64}},
}


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2), (3, 3)])
@pytest.mark.parametrize("cut", CUTS)
def test_any_cutting_of_the_batch(run, plain, cut, workers, stage):
    assert_same(run(workers, stage, **CUTS[cut]), plain)


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 3)])
def test_gradient_checkpointing(run, plain, tiny, workers, stage):
    model = {"path": str(tiny / "model"), "dtype": "fp32", "gradient_checkpointing": True}
    assert_same(run(workers, stage, model=model), plain)


def _inline(recipe, phase, cache, folder) -> Curve:
    from training.distributed import Seat, join, set_environment
    from training.group import InlineGroup, Worker
    from training.recipes import resolve

    seat, hooks = Seat(rank=0, size=1), Recorder(folder)
    set_environment(seat)
    join(seat)
    worker = Worker(seat)
    worker.build("trainer", RECIPES[recipe].roles["trainer"], phase, cache)
    return curve_of(hooks, resolve(RECIPES[recipe].run)(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks))


def test_inline(recipe, plain, tiny, tmp_path):
    phase = CANONICAL[recipe].phase(tiny, stage=2)
    assert_same(in_a_process(_inline, recipe, phase, str(tiny / "cache"), tmp_path), plain)


def test_stages_1_and_2_agree_bit_for_bit(run):
    # They do the same sums in the same order. ZeRO-0 runs Adam over other stretches of memory, and ZeRO-3 brings a matrix
    # product of its own for the gradients of weights, so those agree to rounding.
    assert run(2, 1).losses == run(2, 2).losses


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3)])
def test_bf16_stays_as_near_as_its_rounding_allows(run, plain, workers, stage):
    curve = run(workers, stage, dtype="bf16")
    assert_same_losses(curve.losses, plain.losses, BF16_STEP, BF16_DRIFT)
    assert curve.losses != plain.losses, "this was not computed in bf16"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_does_not_depend_on_the_number_of_workers_either(run, stage):
    # The micro-batches are others, so what is rounded is; gradients are added up in fp32 in both.
    assert_same_losses(run(2, stage, dtype="bf16").losses, run(1, stage, dtype="bf16").losses, BF16_STEP, BF16_DRIFT)
