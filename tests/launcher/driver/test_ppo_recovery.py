"""PPO over three groups of workers on Ray: whoever is killed, the run goes on and ends with the same weights."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from tests.launcher.driver.test_run import nothing_left, processes_of, wait_for
from tests.support.disturbed import Result, Run

__all__ = ["nothing_left"]
pytestmark = [pytest.mark.cpu, pytest.mark.faults, pytest.mark.usefixtures("nothing_left")]

JOB = """
model: {{path: {tiny}/model, dtype: fp32}}
resources: {{threads: 1, gpus_per_worker: 0}}
sharding: {{stage: 2}}
seed: 3
storage: {folder}/runs
phases:
  ppo:
    data: {{train: {tiny}/ppo.train.jsonl, max_length: 64}}
    reward: tests.support.some_rewards:nines
    rollout_batch: 16
    batch: 8
    response_tokens: 8
    max_steps: 12
    learning_rate: 1e-3
    critic_learning_rate: 3e-3
    checkpoint: {{every: 3}}
    groups:
      - {{roles: [policy, reference], workers: 1}}
      - {{roles: [critic, reward], workers: 1}}
      - {{roles: [rollout], workers: 1}}
"""
RANKS = {"policy": 0, "critic": 1, "rollout": 2}


class PPORun(Run):
    """`muster run` of PPO on three workers."""

    def __init__(self, tiny, folder):
        super().__init__(tiny, folder)
        self.write_job(tiny, folder)

    @staticmethod
    def write_job(tiny, folder, *changes):
        text = JOB.format(tiny=tiny, folder=folder)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / "job.yaml").write_text(text)

    @property
    def steps(self):
        return [row for row in self.rows("ppo/metrics.jsonl") if "reward" in row]

    @property
    def result(self):
        measured = [[row[name] for name in ("reward", "kl", "loss", "value_loss")] for row in self.steps]
        return Result(measured, self.read("ppo/model/model.safetensors"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    run = PPORun(tiny, tmp_path_factory.mktemp("whole"))
    run.start()
    run.finish()
    return run.result


@pytest.fixture
def run(tiny, tmp_path):
    run = PPORun(tiny, tmp_path)
    yield run
    run.close()


@pytest.mark.parametrize("role", RANKS)
def test_a_killed_worker_of_any_role(run, whole, role):
    run.start()
    run.reach(5)
    os.kill(run.worker(RANKS[role])["pid"], signal.SIGKILL)
    run.finish()
    assert run.incident["class"] == "killed"
    assert run.result == whole
    assert len(run.rows("ppo/samples.jsonl")) == 4 * 12


def test_a_killed_driver(run, whole, nothing_left):
    run.start()
    run.reach(5)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(60)
    wait_for(lambda: not processes_of(str(nothing_left)), "the end of the workers", 60)
    for leftover in nothing_left.glob("muster-*"):  # Ray's log files, which nobody was left to remove
        shutil.rmtree(leftover)
    run.start(verb="resume")
    run.finish()
    assert run.result == whole
