"""Same job, same curve: one canonical run a recipe, held against a loop
in plain torch whatever the machines and the cutting."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.support.fork_group import in_a_process
from tests.support.training_fixtures import Recorder, phase_of
from training.recipes import RECIPES

pytestmark = pytest.mark.cpu

STEPS, BATCH, RATE = 20, 16, 3e-3
"""The first epoch of 260 samples ends within a batch."""
EVAL_EVERY = 8

FP32_STEP = 1e-6
"""Largest relative difference of a loss. A loss is a sum of some 200 fp32 terms, added up in another order: that is
worth a few units in the last place (6e-8), and what it does to the weights is as small again. Measured over this table:
3.2e-7."""
FP32_DRIFT = 2e-7
"""Largest mean of the relative differences. Rounding has no preferred side: over 20 steps its mean is about the spread
(1e-7) over the root of 20. A sample counted twice or a mean of means leans to one side at every step. Measured: 3e-8,
of pairs 2.8e-6, where one rounding is carried on from step to step."""
FP32_NORM = 3e-6
"""Largest relative difference of a gradient norm: terms of both signs were added up before it is
taken. Measured: 5.5e-7."""
FP32_WEIGHTS = 5e-5
"""Largest difference of a weight (they are of size 0.1, and each moves by up to RATE a step). Where a gradient is so
small that it is mostly rounding, Adam's division by its size makes that rounding count. Measured: 2.1e-5."""
PAIR = 20
"""How many times as far the figures of a reward model may lie. Its loss hangs on differences of two rewards of size 1,
each one dot product that errs by some 1e-7. Where pairs are learnt the loss falls to e^-difference, of which an error
of the difference is a relative error, averaged over 16 pairs alone. Measured: 7.4e-6 of a loss, 1.4e-5 of a norm."""
BF16_STEP, BF16_DRIFT = 2**-7, 2**-9
"""bf16 keeps 8 bits: a rounding errs by up to 2^-9 of the value. On its way to the loss an activation is rounded some
16 times (8 a layer, 2 layers), with random signs: 4 x 2^-9 = 2^-7 at the most. The mean over all steps averages that
out; what remains is the rounding of the weights themselves, once: 2^-9. Measured: 2.8e-3 and 8e-4."""


@dataclass
class Curve:
    """What a run came to."""

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    weights: dict[str, np.ndarray] = field(repr=False)


def canonical(tiny, name, **settings):
    """The canonical phase of an entry of CANONICAL, with what training has: clipping, decay on and off, warm-up and
    decay of the rate, several epochs."""
    recipe, own = CANONICAL[name]
    prefix = "" if recipe == "sft" else f"{recipe}."
    data = {"eval": str(tiny / f"{prefix}eval.jsonl"), **own.get("data", {}), **settings.pop("data", {})}
    common = {"max_steps": STEPS, "batch": BATCH, "learning_rate": RATE, "eval_every": EVAL_EVERY, "data": data}
    return phase_of(tiny, recipe, **{**common, **{key: own[key] for key in own if key != "data"}, **settings})


def in_plain_torch(tiny, name) -> Curve:
    """The same in plain torch: no DeepSpeed, no packing, no padding, no micro-batches, one sample at a time."""
    import torch

    from training.data.order import Order
    from training.data.phase_data import open_stores
    from training.models.loading import load
    from training.schedule import learning_rate

    phase = canonical(tiny, name)
    is_reward = phase.recipe == "reward"
    stores = open_stores(phase, tiny / "cache")
    order = Order(stores.train.source_sizes, seed=phase.seed)
    model = load(phase, torch.float32, "cpu", classifier=is_reward)
    loss_over = _pair_loss if is_reward else _token_loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for n, p in trained.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in trained.items() if p.ndim != 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8)
    losses, norms, evaluations = [], [], []
    for step in range(1, STEPS + 1):
        samples = order.samples((step - 1) * BATCH, step * BATCH)
        losses.append(loss_over(model, stores.train, samples, backward=True))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase.learning_rate, phase.schedule, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVAL_EVERY == 0 or step == STEPS:
            evaluations.append(loss_over(model, stores.eval, range(len(stores.eval)), backward=False))
    return Curve(losses, norms, evaluations, {name: p.detach().numpy() for name, p in trained.items()})


def _token_loss(model, store, samples, *, backward: bool) -> float:
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


def _pair_loss(model, store, samples, *, backward: bool) -> float:
    """Loss per pair over some pairs, each sequence by itself through transformers' own classifier."""
    import torch
    from torch.nn.functional import logsigmoid

    total = 0.0
    for i in samples:
        ids, last = (torch.from_numpy(a) for a in store[int(i)])
        cut = int(last.nonzero()[0]) + 1
        with torch.set_grad_enabled(backward):
            chosen, rejected = (model(side[None], use_cache=False).logits[0, 0] for side in (ids[:cut], ids[cut:]))
            loss = -logsigmoid(chosen - rejected - float(store.margins[i])) / len(samples)
        if backward:
            loss.backward()
        total += loss.item()
    return total


LORA = {"rank": 4, "alpha": 8}
CANONICAL = {
    "sft": ("sft", {}),
    "pretrain": ("pretrain", {"data": {"max_length": 64}}),
    "cft": ("cft", {"learning_rate": 1e-3}),  # its norm falls so steeply that 3e-3 magnifies rounding
    "reward": ("reward", {}),
    "sft, LoRA": ("sft", {"lora": LORA}),
    "reward, LoRA": ("reward", {"lora": {**LORA, "targets": ["q_proj", "v_proj"]}}),
}
"""Every recipe joins this table, and with it all of the tests below."""


def test_every_recipe_has_a_canonical_run():
    """Of PPO, whose batches come from the policy itself, the formulas
    and the layouts are held against each other in rl/."""
    assert {recipe for recipe, _ in CANONICAL.values()} == RECIPES.keys() - {"ppo"}


@pytest.fixture(scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def plain(name, tiny) -> Curve:
    return in_plain_torch(tiny, name)


@pytest.fixture(scope="module")
def run(name, tiny, tmp_path_factory):
    """run(workers, stage, **settings) -> Curve, remembered for whoever asks again."""
    from tests.support.fork_group import ForkGroup
    from training.recipes import resolve

    known: dict[str, Curve] = {}

    def run(workers: int, stage: int, **settings) -> Curve:
        key = f"{workers} {stage} {settings}"
        if key not in known:
            phase = canonical(tiny, name, workers=workers, stage=stage, **settings)
            hooks = Recorder(tmp_path_factory.mktemp("checkpoints"))
            recipe = RECIPES[phase.recipe]
            with ForkGroup(workers, recipe.roles["trainer"], phase, str(tiny / "cache")) as group:
                last = resolve(recipe.run)(phase, {"trainer": group}, hooks)
            known[key] = curve_of(hooks, last)
        return known[key]

    return run


def table(*places: tuple, also: tuple[tuple, ...] = (), seldom: tuple[tuple, ...] = ()):
    """Parameters of a test at some places: SFT at all that are no `seldom` ones, other entries `also` at some;
    the rest in the long tests."""

    def long(entry: str, place: tuple) -> list[pytest.MarkDecorator]:
        return [] if place in also or (entry == "sft" and place not in seldom) else [pytest.mark.long]

    cases = [
        pytest.param(entry, *place, marks=[pytest.mark.xdist_group("curves"), *long(entry, place)])
        for entry in CANONICAL
        for place in places
    ]
    return pytest.mark.parametrize(("name", "workers", "stage"), cases, indirect=["name"], scope="module")


def curve_of(hooks: Recorder, last) -> Curve:
    from training.checkpoint.format import Reader

    reader = Reader(last)
    weights = {name: reader.whole(name) for name in reader.manifest.parameters}
    columns = ([row[name] for row in hooks.rows if name in row] for name in ("loss", "grad_norm", "eval_loss"))
    return Curve(*columns, weights)


def assert_same_losses(got, expected, step=FP32_STEP, drift=FP32_DRIFT):
    difference = np.array(got) / np.array(expected) - 1
    assert np.abs(difference).max() <= step
    assert abs(difference.mean()) <= drift


def assert_same(curve: Curve, expected: Curve, name: str):
    times = PAIR if name.startswith("reward") else 1
    assert len(curve.losses) == STEPS
    assert_same_losses(curve.losses, expected.losses, times * FP32_STEP, times * FP32_DRIFT)
    assert curve.norms == pytest.approx(expected.norms, rel=times * FP32_NORM)
    # Too few for a mean.
    assert_same_losses(curve.evaluations, expected.evaluations, times * FP32_STEP, times * FP32_STEP)
    assert curve.weights.keys() == expected.weights.keys()
    furthest = {name: np.abs(values - expected.weights[name]).max() for name, values in curve.weights.items()}
    assert max(furthest.values()) <= FP32_WEIGHTS, max(furthest, key=furthest.get)


def test_the_checks_can_fail():
    rng = np.random.default_rng(0)
    expected = np.linspace(6, 0.5, STEPS)
    rounding = 1 + 1e-7 * rng.standard_normal(STEPS)
    assert_same_losses(expected * rounding, expected)
    with pytest.raises(AssertionError):
        assert_same_losses(expected * rounding * (1 + 4e-7), expected)  # far below the limit of a step, and one-sided
    with pytest.raises(AssertionError):
        assert_same_losses(np.where(np.arange(STEPS) == STEPS // 2, expected * 1.00001, expected), expected)


@table(
    *[(workers, stage) for workers in (1, 2, 3, 4) for stage in (0, 1, 2, 3)],
    also=((1, 0), (2, 2)),
    seldom=((1, 1), (1, 3), (3, 0), (3, 2), (4, 0), (4, 1), (4, 3)),
)
def test_any_number_of_workers_and_any_stage(run, plain, name, workers, stage):
    assert_same(run(workers, stage), plain, name)


CUTS = {
    "padded": {"data": {"pack": False}},
    "one by one": {"micro_batch": 1},
    "three by three, padded": {"micro_batch": 3, "data": {"pack": False}},
    "64 tokens at a time": {"micro_tokens": 64, "data": {"max_length": 64}},
}


@table((1, 0), (2, 2), (2, 3), (3, 3), seldom=((2, 3), (3, 3)))
@pytest.mark.parametrize("cut", CUTS)
def test_any_cutting_of_the_batch(run, plain, name, cut, workers, stage):
    assert_same(run(workers, stage, **CUTS[cut]), plain, name)


@table((2, 3))
def test_cutting_where_every_micro_batch_gathers_the_weights(run, plain, name, workers, stage):
    assert_same(run(workers, stage, **CUTS["64 tokens at a time"]), plain, name)


@table((1, 0), (2, 3))
def test_gradient_checkpointing(run, plain, tiny, name, workers, stage):
    lora = CANONICAL[name][1].get("lora")
    model = {"path": str(tiny / "model"), "dtype": "fp32", "gradient_checkpointing": True, "lora": lora}
    assert_same(run(workers, stage, model=model), plain, name)


def _inline(phase, cache, folder) -> Curve:
    from training.group import InlineGroup, Worker
    from training.process.distributed import RankInfo, join, set_environment
    from training.recipes import resolve

    rank_info, hooks, recipe = RankInfo(rank=0, size=1), Recorder(folder), RECIPES[phase.recipe]
    set_environment(rank_info)
    join(rank_info)
    worker = Worker(rank_info)
    worker.build("trainer", recipe.roles["trainer"], phase, cache)
    return curve_of(hooks, resolve(recipe.run)(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks))


@table((1, 2))
def test_inline(name, plain, tiny, tmp_path, workers, stage):
    phase = canonical(tiny, name, workers=workers, stage=stage)
    assert_same(in_a_process(_inline, phase, str(tiny / "cache"), tmp_path), plain, name)


@table((2, 1))
def test_stages_1_and_2_agree_bit_for_bit(run, workers, stage):
    # They do the same sums in the same order. ZeRO-0 runs Adam over other stretches of memory, and ZeRO-3 brings a
    # matrix product of its own for the gradients of weights, so those agree to rounding.
    assert run(workers, stage).losses == run(workers, stage + 1).losses


@table((1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (3, 3), seldom=((1, 2), (2, 2), (3, 1)))
def test_bf16_stays_as_near_as_its_rounding_allows(run, plain, workers, stage):
    curve = run(workers, stage, dtype="bf16")
    assert_same_losses(curve.losses, plain.losses, BF16_STEP, BF16_DRIFT)
    assert curve.losses != plain.losses, "this was not computed in bf16"


@table((2, 0), (2, 1), (2, 3))
def test_bf16_does_not_depend_on_the_number_of_workers_either(run, workers, stage):
    # The micro-batches are others, so what is rounded is; gradients are added up in fp32 in both.
    assert_same_losses(
        run(workers, stage, dtype="bf16").losses, run(1, stage, dtype="bf16").losses, BF16_STEP, BF16_DRIFT
    )
