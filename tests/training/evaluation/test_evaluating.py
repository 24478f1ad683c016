"""Evaluation in parts: a checkpoint comes before it, whatever ends it costs no step, and it is done again."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.fork_group import ForkGroup
from tests.support.training_fixtures import Recorder, sft_phase
from tests.training.checkpoint.test_exact_resume import state
from training.checkpoint.format import Manifest
from training.checkpoint.repository import Checkpoints, step_of
from training.drivers import evaluating, supervised
from training.errors import TrainingError
from training.recipes import RECIPES

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def a_batch_a_call(monkeypatch):
    monkeypatch.setattr(evaluating, "TARGET_S", 0.0)


class StopsWithin(Recorder):
    """Asked to stop when an evaluation of the step `stop_after` has begun: after its third part."""

    def stop_requested(self) -> bool:
        rows = [row for row in self.rows if row["step"] == self.stop_after]
        self.asked = getattr(self, "asked", 0) + bool(rows)
        return self.asked > 3


def settings(tiny, **more) -> dict:
    """Of a phase that is evaluated by its loss, in 3 parts, and by answers, in 5 of each of two workers."""
    questions = {"data": str(tiny / "ppo.eval.jsonl"), "max_new_tokens": 4, "batch": 4}
    return {"data": {"eval": str(tiny / "eval.jsonl")}, "eval": questions, "max_steps": 8, **more}


def curve(*runs: Recorder) -> list[dict]:
    """All that is measured, but for time and memory."""
    return [
        {key: row[key] for key in row if not key.endswith(("_s", "memory_gib"))} for run in runs for row in run.rows
    ]


def kept(run: Recorder) -> dict[int, dict]:
    folders = Checkpoints(run.checkpoints.root).folders()
    return {step_of(folder): Manifest.read(folder).metrics for folder in folders}


@pytest.mark.parametrize(("stage", "every"), [(2, 4), (3, 3)])
def test_an_interrupted_evaluation_is_done_again_and_its_step_is_saved(tiny, train, tmp_path, stage, every):
    """At a step that is saved before it is evaluated, and at one that is not."""
    common = settings(
        tiny, stage=stage, eval_every=4, checkpoint={"every": every, "best": {"metric": "eval_loss", "mode": "max"}}
    )
    whole = train(2, **common)
    first = train(2, checkpoints=tmp_path, stop_after=4, hooks=StopsWithin, **common)
    assert first.last is None
    assert "eval_loss" not in first.rows[-1]
    assert kept(first)[4] == {}
    second = train(2, checkpoints=tmp_path, **common)
    assert (second.first, "eval_accuracy" in second.rows[0]) == (4, True)
    assert curve(first, second) == curve(whole)
    assert kept(second) == kept(whole)
    assert all(kept(whole).values())


def test_a_phase_is_not_finished_before_its_last_evaluation_is(tiny, train, tmp_path):
    common = settings(tiny)
    first = train(1, checkpoints=tmp_path, stop_after=8, hooks=StopsWithin, **common)
    assert (first.last, kept(first)) == (None, {8: {}})
    second = train(1, checkpoints=tmp_path, **common)
    assert second.last is not None
    assert (second.losses, len(second.rows)) == ([], 1)
    assert kept(second)[8].keys() > {"eval_loss", "eval_accuracy"}


def test_an_interrupted_evaluation_of_ppo_is_done_again(tiny, train, tmp_path):
    common = settings(
        tiny, recipe="ppo", data={"max_length": 64}, reward="tests.support.some_rewards:length",
        critic=str(tiny / "model"),
        rollout_batch=8, batch=8, response_tokens=4, critic_learning_rate=3e-3, eval_every=1, max_steps=2,
    )  # fmt: skip
    whole = train(1, **common)
    first = train(1, checkpoints=tmp_path, stop_after=1, hooks=StopsWithin, **common)
    assert (first.last, kept(first)) == (None, {1: {}})
    second = train(1, checkpoints=tmp_path, **common)
    assert curve(first, second) == curve(whole)
    assert kept(second)[2] == kept(whole)[2]


class AsksWithin(Recorder):
    """Somebody asks for a checkpoint while step 4 is evaluated: between two batches of answers."""

    def save_requested(self, step) -> bool:
        self.looked = getattr(self, "looked", 0) + (step == 4)
        return self.looked == 6 and "eval_loss" not in self.rows[-1]


def test_what_is_saved_in_the_middle_of_an_evaluation_is_the_state_after_its_step(tiny, train):
    common = settings(tiny, stage=3, eval_every=4)
    whole = train(2, checkpoint={"every": 4}, **common)
    asked = train(2, checkpoint={"every": "2h"}, hooks=AsksWithin, **common)
    assert curve(asked) == curve(whole)
    assert kept(asked) == kept(whole)
    assert [state(run.checkpoints.at(4)) for run in (asked, whole)] == [state(whole.checkpoints.at(4))] * 2


class KillsWithin(Recorder):
    """Kills a worker in the middle of the evaluation of step 8, once that step is committed."""

    processes = ()

    def stop_requested(self) -> bool:
        if self.rows and self.rows[-1]["step"] == 8:
            if [fields for kind, fields in self.events if kind == "checkpoint" and fields["step"] == 8]:
                os.kill(self.processes[1].pid, signal.SIGKILL)
            else:  # it is committed between two calls, once both have written
                time.sleep(0.5)
        return False


def test_a_worker_that_dies_while_it_evaluates_costs_no_step(tiny, tmp_path):
    phase = sft_phase(tiny, workers=2, stage=2, **settings(tiny, checkpoint={"every": 100}))
    hooks = KillsWithin(tmp_path)
    with ForkGroup(2, RECIPES["sft"].roles["trainer"], phase, str(tiny / "cache")) as group:
        hooks.processes = group.processes
        with pytest.raises(TrainingError):  # that it died, or that the other one has lost it
            supervised.run(phase, {"trainer": group}, hooks)
    assert (hooks.rows[-1]["step"], "eval_loss" in hooks.rows[-1]) == (8, False)
    assert kept(hooks) == {8: {}}
