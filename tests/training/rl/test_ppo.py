"""PPO over real workers: it learns, its curve does not depend on the machines, it resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.training_fixtures import Recorder, phase_of
from training.checkpoint.format import write_shard
from training.data.batching import BatchLimits
from training.drivers import ppo
from training.errors import Diverged
from training.group import Done
from training.phase_info import PhaseInfo
from training.rl.experience import Response
from training.storage import open_storage

pytestmark = [pytest.mark.cpu, pytest.mark.xdist_group("curves")]
NINES = "tests.support.some_rewards:nines"


def settings(tiny, **more):
    return {
        "recipe": "ppo", "reward": NINES, "critic": str(tiny / "model"), "rollout_batch": 16, "batch": 8,
        "response_tokens": 8,
        "max_steps": 3, "learning_rate": 1e-3, "critic_learning_rate": 3e-3, "data": {"max_length": 64}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(tiny, train):
    """One worker without ZeRO."""
    return train(1, **settings(tiny))


def curve(hooks):
    names = ("reward", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "critic_grad_norm", "response_tokens")
    return np.array([[row[name] for name in names] for row in hooks.rows if "reward" in row])


def test_the_first_iteration_is_at_the_reference(plain):
    first = plain.rows[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert {
        "iteration",
        "explained_variance",
        "eos_rate",
        "clip_fraction",
        "generate_s",
        "score_s",
        "learn_s",
        "driver_s",
    } <= first.keys()


@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (1, 2), (2, 3)])
def test_the_curve_does_not_depend_on_the_machines(tiny, train, plain, workers, stage):
    assert curve(train(workers, stage=stage, **settings(tiny))) == pytest.approx(curve(plain), rel=1e-3, abs=1e-4)


LAYOUTS = {
    "two groups": [{"roles": ["policy", "reference"], "workers": 2}, {"roles": ["critic", "reward"], "workers": 1}],
    "four groups": [{"roles": [role], "workers": 1} for role in ("policy", "reference", "critic", "reward")],
    "rollout apart": [
        {"roles": ["policy", "reference", "critic"], "workers": 2, "sharding": {"stage": 3}},
        {"roles": ["rollout", "reward"], "workers": 1},
    ],
    "other stages": [
        {"roles": ["policy", "reward"], "workers": 1, "sharding": {"stage": 2}},
        {"roles": ["critic", "reference"], "workers": 2, "sharding": {"stage": 3}},
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_does_not_depend_on_who_sits_where(tiny, train, plain, layout):
    assert curve(train(1, **settings(tiny, groups=LAYOUTS[layout]))) == pytest.approx(curve(plain), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("layout", ["two groups", "rollout apart"])
def test_the_curve_does_not_depend_on_the_rounds(tiny, train, plain, layout):
    """Two writers have eight responses each, the last round is a smaller one; one has sixteen."""
    in_rounds = train(1, **settings(tiny, generation_batch=3, groups=LAYOUTS[layout]))
    assert curve(in_rounds) == pytest.approx(curve(plain), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("stage", "lora"), [(3, None), (2, {"rank": 4})])
def test_the_curve_does_not_depend_on_how_the_prompts_are_batched(tiny, train, stage, lora):
    plain, continuous = (
        train(2, stage=stage, lora=lora, **settings(tiny, generation=how, max_steps=2))
        for how in ("batched", "continuous")
    )
    assert curve(continuous) == pytest.approx(curve(plain), rel=1e-3, abs=1e-4)


def test_the_kl_as_a_loss_holds_the_policy(tiny, train, plain):
    """A heavy weight keeps it nearer to where it was; on two workers as on one."""
    held = {"kl": {"estimator": "k3", "beta": 20.0}, "entropy": 0.01}
    one, two = (train(workers, stage=2, **settings(tiny, **held)) for workers in (1, 2))
    assert curve(two) == pytest.approx(curve(one), rel=1e-3, abs=1e-4)
    assert 0 < abs(one.rows[-1]["kl"]) < abs(plain.rows[-1]["kl"])


def test_it_learns_what_is_rewarded(tiny, train):
    hooks = train(1, **settings(tiny, max_steps=25, rollout_batch=32, batch=16))
    rewards = [row["reward"] for row in hooks.rows if "reward" in row]
    print(rewards)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 1


# ── resuming ──


class StopsWithin(Recorder):
    """Asked to stop in the middle of the iteration after `stop_after`."""

    times_asked = 0

    def stop_requested(self) -> bool:
        self.times_asked += super().stop_requested()
        return self.times_asked > 1  # the first time is before the iteration


@pytest.mark.parametrize(("workers", "stage", "kind"), [(1, 0, StopsWithin), (2, 2, Recorder)])
def test_it_goes_on_bit_for_bit(tiny, train, tmp_path, workers, stage, kind):
    """Weights of both learners, moments, beta, the statistics of scores, the place in the prompts."""
    more = {"kl": {"target": 0.5}, "normalize_scores": True, "max_steps": 4, "checkpoint": {"every": 2}}
    whole = train(workers, stage=stage, **settings(tiny, **more))
    train(workers, tmp_path, stop_after=2, stage=stage, hooks=kind, **settings(tiny, **more))
    on = train(workers, tmp_path, stage=stage, **settings(tiny, **more))
    assert on.first == 2
    assert (curve(on) == curve(whole)[2:]).all()
    assert contents(on.last) == contents(whole.last)


def contents(checkpoint):
    from training.checkpoint.format import Reader

    reader = Reader(checkpoint)
    manifest = reader.manifest
    assert {name.partition("/")[0] for name in manifest.parameters} == {"policy", "critic"}
    assert manifest.optimizer_steps == {"policy": 16, "critic": 16}  # 4 iterations of 2 passes over 2 minibatches
    return manifest.state, {name: reader.whole(name).tobytes() for name in manifest.parameters}


def test_what_it_ends_with_is_the_policy(tiny, plain, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from training.checkpoint.export import export
    from training.checkpoint.format import Reader

    export(plain.last, open_storage(tmp_path / "model"), phase_of(tiny, **settings(tiny)))
    lm, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    reader = Reader(plain.last, "policy/")
    for name, parameter in lm.named_parameters():
        assert (reader.whole(name) == parameter.detach().numpy()).all()


# ── a rollout group that writes ahead ──


def ahead(workers=1, writers=1, **more):
    together = {"roles": ["policy", "reference", "critic", "reward"], "workers": workers}
    return {"groups": [together, {"roles": ["rollout"], "workers": writers}], "async": 1, **more}


@pytest.fixture(scope="module")
def written_ahead(tiny, train):
    return train(1, **settings(tiny, **ahead(max_steps=4)))


def test_responses_are_a_policy_behind_but_for_the_first(tiny, train, plain, written_ahead):
    still = train(1, **settings(tiny, learning_rate=1e-12))
    assert curve(written_ahead)[0] == pytest.approx(curve(plain)[0], rel=1e-3, abs=1e-4)
    assert (
        written_ahead.rows[1]["response_tokens"] == still.rows[1]["response_tokens"]
    )  # by the policy as it was at first
    assert written_ahead.rows[1]["reward"] == still.rows[1]["reward"]
    behind = [row["staleness_kl"] for row in written_ahead.rows]
    assert behind[0] == pytest.approx(0, abs=1e-6)
    assert min(behind[1:]) > 1e-4


@pytest.mark.parametrize(("stage", "workers", "writers"), [(3, 2, 1), (2, 1, 2)])
def test_ahead_the_curve_does_not_depend_on_the_machines_either(tiny, train, written_ahead, stage, workers, writers):
    other = train(1, stage=stage, **settings(tiny, **ahead(workers, writers, max_steps=4)))
    assert curve(other) == pytest.approx(curve(written_ahead), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", [Recorder, StopsWithin])
def test_what_was_written_ahead_is_learnt_from_after_an_interruption(tiny, train, tmp_path, written_ahead, kind):
    """The policy that wrote it is no more: it is part of the checkpoint."""
    first = train(1, tmp_path, stop_after=2, hooks=kind, **settings(tiny, **ahead(max_steps=4)))
    on = train(1, tmp_path, **settings(tiny, **ahead(max_steps=4)))
    assert (len(first.rows), on.first) == (2, 2)
    assert (curve(on) == curve(written_ahead)[2:]).all()
    assert contents(on.last) == contents(written_ahead.last)


def test_it_learns_from_what_was_written_ahead(tiny, train):
    hooks = train(1, **settings(tiny, **ahead(max_steps=25, rollout_batch=32, batch=16)))
    rewards = [row["reward"] for row in hooks.rows if "reward" in row]
    print(rewards)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 1


def test_a_token_counts_as_much_as_it_has_become_likelier():
    import torch

    from training.rl.losses import importance

    old, written = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -5.0])
    assert importance(old, written).tolist() == pytest.approx([1.0, np.exp(-1), 2.0])


def test_who_writes_ahead_sits_alone(tiny):
    together = [
        {"roles": ["policy", "reference", "critic"], "workers": 1},
        {"roles": ["rollout", "reward"], "workers": 1},
    ]
    for groups in (None, together):
        with pytest.raises(ValueError, match="needs a group of its own for rollout"):
            phase_of(tiny, **settings(tiny, **{"async": 1}, groups=groups))


# ── the driver alone ──


class Awaited(Done):
    """Writes down that it was waited for."""

    def __init__(self, answer, asked, entry):
        super().__init__(answer)
        self.asked, self.entry = asked, entry

    def result(self, timeout_s=None):
        self.asked.append(self.entry)
        return super().result(timeout_s)


class Fake:
    """A group of one whose role answers from a table and writes down what it was asked."""

    size = 1

    def __init__(self, role, asked, answers):
        self.role, self.asked, self.answers = role, asked, answers

    def call(self, method, *args):
        self.asked.append((self.role, method))
        answer = self.answers[method] if method in self.answers else getattr(self, method)
        answer = answer(*args) if callable(answer) else answer
        return [Awaited(answer, self.asked, (self.role, "written", args[1])) if method == "roll_out" else Done(answer)]

    def map(self, method, shards, *args):
        return self.call(method, shards[0], *args)

    def begin_save(self, staged):
        self.staged = open_storage(staged)
        return {"optimizer_step": 1, "parameters": {}}

    def finish_save(self):
        return [write_shard(self.staged / f"{self.role}.safetensors", [("fp32/w@0", 1)], np.zeros(1, np.float32))]


def ones(share):
    return [np.full(len(item.ids) - item.start, -1.0, np.float32) for rows in share for row in rows for item in row]


def improved(shares, weights, rate, names, numbers):
    means = dict.fromkeys(("policy_loss", "clip_fraction", "approx_kl", "entropy", "value_loss"), 0.5)
    return {"means": [means] * len(shares), "grad_norms": [1.0] * len(shares), "memory_gib": 1.0, "gpu_full": 0.0}


def driven(tiny, tmp_path, hooks=None, **more):
    """What the roles were asked in two iterations of 4 responses, and what was logged."""
    asked = []
    phase = phase_of(tiny, **settings(tiny, rollout_batch=4, batch=2, max_steps=2, checkpoint={"every": 5}, **more))
    ids = np.arange(1, 6)
    responses = [
        Response(
            place=i, number=i, sample=0, prompt=ids, tokens=ids[: i + 1], ended=i < 3, row={"prompt": "?"}, text="!"
        )
        for i in range(4)
    ]

    def written(iteration, nth):
        return responses[nth * phase.generation_batch :][: phase.generation_batch]

    def told(responses):
        return [np.full(len(each.tokens), -1.0, np.float32) for each in responses.result()]

    info = PhaseInfo(
        total_steps=2, total_samples=8, num_samples=4, num_eval_samples=0, num_parameters=1, dtype="float32",
        attention="sdpa", device="cpu", data_hash="d", chats=False, notes=[],
    )  # fmt: skip
    learning = {
        "limits": BatchLimits(micro_tokens=64), "computed": ones, "improve": improved, "cannot_save_to": None,
        "get_ready": None,
        "is_saving": False, "restore": None, "publish": None,
    }  # fmt: skip
    answers = {
        "policy": {"setup": info, "roll_out": written, "num_buckets": 1, "bucket": {}, **learning},
        "reference": {"setup": None, "limits": BatchLimits(micro_tokens=64), "computed": ones},
        "critic": {"setup": None, **learning},
        "rollout": {
            "setup": None,
            "roll_out": written,
            "log_probs": told,
            "load": None,
        },
        "reward": {"setup": None, "scores": lambda part: [np.array([each.number], np.float32) for each in part]},
    }
    hooks = hooks or Recorder(tmp_path)
    seated = {role for roles, _ in phase.placements for role in roles}
    groups = {role: Fake(role, asked, table) for role, table in answers.items() if role in seated}
    hooks.last = ppo.run(phase, groups, hooks)
    return asked, hooks


ITERATION = [
    ("policy", "roll_out"),
    ("policy", "computed"), ("reference", "computed"), ("critic", "computed"), ("reward", "scores"),
    ("policy", "improve"), ("critic", "improve"),
    ("policy", "improve"), ("critic", "improve"),
]  # fmt: skip


def asked_to_work(asked):
    return [each for each in asked if each[1] in ("roll_out", "computed", "scores", "improve")]


def test_the_driver_generates_scores_and_improves(tiny, tmp_path):
    asked, hooks = driven(tiny, tmp_path)
    assert asked_to_work(asked) == ITERATION * 2
    assert asked[:4] == [(role, "setup") for role in ("policy", "reference", "critic", "reward")]
    row = hooks.rows[0]
    assert (row["reward"], row["response_tokens"], row["eos_rate"], row["tokens"]) == (1.5, 2.5, 0.75, 10)
    # What is written down: the least and the most rewarded, and the first others.
    assert [sample["reward"] for sample in hooks.sampled[:4]] == [0.0, 3.0, 1.0, 2.0]


def test_a_request_to_stop_does_not_wait_for_the_rest_of_an_iteration_that_has_learnt_nothing(tiny, tmp_path):
    asked, hooks = driven(tiny, tmp_path, StopsWithin(tmp_path, stop_after=1))
    assert asked_to_work(asked) == [*ITERATION, ("policy", "roll_out")]
    assert hooks.last is None
    assert [folder.name for folder in hooks.checkpoints.folders()] == ["step-00000001"]
    on, again = driven(tiny, tmp_path)
    assert asked_to_work(on) == ITERATION
    assert again.last == again.checkpoints.at(2)


@pytest.mark.parametrize("writers", ["policy", "rollout"])
def test_a_round_is_scored_while_the_next_is_written(tiny, tmp_path, writers):
    apart = {"groups": LAYOUTS["rollout apart"]} if writers == "rollout" else {}
    asked, hooks = driven(tiny, tmp_path, generation_batch=3, **apart)
    scoring = ITERATION[1:5]
    first = [each for each in asked if each[1] in ("roll_out", "written", "computed", "scores")][:12]
    assert first == [
        (writers, "roll_out"), (writers, "roll_out"), (writers, "written", 0), *scoring, (writers, "written", 1),
        *scoring,
    ]  # fmt: skip
    assert (hooks.rows[0]["reward"], hooks.rows[0]["tokens"]) == (1.5, 10)


def test_the_next_responses_are_begun_before_these_are_learnt_from(tiny, tmp_path):
    asked, _ = driven(tiny, tmp_path, **ahead())
    sent = [("policy", "num_buckets"), ("policy", "bucket"), ("rollout", "load")]
    write, recall = ("rollout", "roll_out"), ("rollout", "log_probs")
    rest = [each for each in ITERATION if each != ("policy", "roll_out")]
    begun = [each for each in asked if each in {*sent, write, recall} or each in rest]
    assert begun == [*sent, write, recall, *sent, write, recall, *rest, *rest]


def test_the_critic_may_warm_up_alone(tiny, tmp_path):
    asked, _ = driven(tiny, tmp_path, critic_warmup=1)
    first = asked_to_work(asked)[:-9]
    assert first == [each for each in ITERATION if each != ("policy", "improve")]


def test_values_are_not_held_while_the_critic_warms_up(tiny, tmp_path, monkeypatch):
    told = []
    answer = improved

    def improve(shares, weights, rate, names, numbers):
        told.append((names, numbers))
        return answer(shares, weights, rate, names, numbers)

    monkeypatch.setitem(globals(), "improved", improve)
    driven(tiny, tmp_path, critic_warmup=1, value_clip=0.3, ppo_epochs=1)
    of_critic, of_policy = ("values", "returns"), ("old", "advantages")
    assert told == [(of_critic, {}), (of_policy, {}), (of_critic, {"clip": 0.3})]


def test_passes_end_when_the_policy_has_gone_far_enough(tiny, tmp_path):
    asked, _ = driven(tiny, tmp_path, kl={"stop": 0.4})
    assert asked_to_work(asked) == ITERATION[:-2] * 2


def test_beta_follows_the_kl(tiny, tmp_path):
    _, hooks = driven(tiny, tmp_path, kl={"beta": 0.1, "target": 1.0, "horizon": 40})
    # Policy and reference are one: the KL is 0, the error is cut at -0.2, 4 of 40 samples have passed.
    assert [row["beta"] for row in hooks.rows] == pytest.approx([0.1, 0.1 * (1 - 0.2 * 4 / 40)])


@pytest.mark.parametrize(
    ("stop", "last"), [({"reward": 1.5}, 1), ({"reward": 1.6}, 2), ({"kl": 0.1}, 2), ({"kl": 0.1, "reward": 1.0}, 1)]
)
def test_it_ends_where_it_should(tiny, tmp_path, stop, last):
    _, hooks = driven(tiny, tmp_path, stop=stop)
    assert hooks.rows[-1]["step"] == last
    assert [folder.name for folder in hooks.checkpoints.folders()] == [f"step-0000000{last}"]
    assert hooks.last == hooks.checkpoints.at(last)
    again, _ = driven(tiny, tmp_path, stop=stop)
    assert asked_to_work(again) == []


def test_a_loss_that_is_no_number_ends_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ones", lambda share: [np.full_like(each, np.nan) for each in computed_ones(share)])
    with pytest.raises(Diverged, match=r"iteration 1: .*kl is nan"):
        driven(tiny, tmp_path)


computed_ones = ones


# ── adapters ──


LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def adapters(tiny, train):
    """Where every role has a base of its own: four groups."""
    groups = [{"roles": [role], "workers": 1} for role in ("policy", "reference", "critic", "reward")]
    return train(1, lora=LORA, **settings(tiny, groups=groups))


def test_adapters_are_improved_alone(adapters):
    from training.checkpoint.format import Reader

    names = Reader(adapters.last).manifest.parameters
    assert all(".default." in name or name == "critic/score.weight" for name in names)
    assert adapters.rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert adapters.rows[-1]["kl"] != 0


@pytest.mark.parametrize(("workers", "stage"), [pytest.param(1, 0, marks=pytest.mark.long), (2, 2), (2, 3)])
def test_one_base_for_all_roles_gives_the_same(tiny, train, adapters, workers, stage):
    """Below ZeRO-3 the roles of a group share it."""
    hooks = train(workers, stage=stage, lora=LORA, **settings(tiny))
    assert curve(hooks) == pytest.approx(curve(adapters), rel=1e-3, abs=1e-4)


def test_adapters_go_on_bit_for_bit(tiny, train, tmp_path):
    more = {"lora": LORA, "max_steps": 4, "checkpoint": {"every": 2}, "stage": 2}
    whole = train(2, **settings(tiny, **more))
    train(2, tmp_path, stop_after=2, **settings(tiny, **more))
    on = train(2, tmp_path, **settings(tiny, **more))
    assert contents(on.last) == contents(whole.last)


def test_a_policy_that_starts_from_an_adapter_is_compared_with_it(tiny, train, tmp_path):
    """The reference is base and adapter as they were: a copy of the adapter in the shared base,
    or merged in a base of its own."""
    from training.checkpoint.export import export

    sft = train(1, lora=LORA, max_steps=4)
    export(sft.last, open_storage(tmp_path / "adapter"), phase_of(tiny, "sft", lora=LORA))
    model = {"path": str(tmp_path / "adapter"), "dtype": "fp32", "lora": LORA}
    groups = [{"roles": [role], "workers": 1} for role in ("policy", "reference", "critic", "reward")]
    shared, apart = (
        train(1, model=model, **settings(tiny, critic=str(tiny / "model"), **more)) for more in ({}, {"groups": groups})
    )
    assert shared.rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert curve(shared) == pytest.approx(curve(apart), rel=1e-3, abs=1e-4)


def test_a_reward_model_that_is_an_adapter_is_asked_in_the_shared_base(tiny, train, tmp_path):
    from training.checkpoint.export import export

    learnt = train(1, recipe="reward", lora=LORA, max_steps=4)
    export(learnt.last, open_storage(tmp_path / "reward"), phase_of(tiny, "reward", lora=LORA))
    of_adapter = {"reward": str(tmp_path / "reward"), "critic": str(tmp_path / "reward"), "lora": LORA}
    groups = [{"roles": [role], "workers": 1} for role in ("policy", "reference", "critic", "reward")]
    shared, apart = (train(2, stage=2, **settings(tiny, **of_adapter, **more)) for more in ({}, {"groups": groups}))
    assert curve(shared) == pytest.approx(curve(apart), rel=1e-3, abs=1e-4)
    assert shared.rows[0]["reward_std"] > 0
