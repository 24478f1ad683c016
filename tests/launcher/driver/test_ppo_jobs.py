"""PPO by the command line: what its job file may say, what is refused, and that a whole job runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.driver.driver import with_its_start
from launcher.jobfile import job as jobs
from launcher.runfolder.run_folder import RunFolder
from tests.launcher.cli.test_bad_input import refused
from tests.support.raw_server import CUT, RawServer, whole

JOB = """\
name: better
model: {path: model, dtype: fp32}
resources: {workers: 1, threads: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: data/train.jsonl, template: none, max_length: 32}
    max_steps: 2
    batch: 4
  reward:
    data: {train: data/pairs.jsonl, template: none, max_length: 32}
    max_steps: 2
    batch: 4
  ppo:
    from: sft
    reward: reward
    data: {train: data/prompts.jsonl, max_length: 24}
    rollout_batch: 4
    batch: 2
    response_tokens: 6
    max_steps: 2
"""


@pytest.fixture
def better(place) -> Path:
    (place / "better.yaml").write_text(JOB)
    pairs = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(20)]
    prompts = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(20)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (place / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "mine.py").write_text("def score(prompts, completions, answer):\n    return [0.0] * len(answer)\n")
    return place


def edited(place: Path, *changes: tuple[str, str]) -> tuple[str, ...]:
    text = (place / "better.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (place / "edited.yaml").write_text(text)
    return ("check", "edited.yaml")


def test_a_reward_may_be_a_phase_a_folder_a_function_or_an_endpoint(better):
    several = '[reward, {path: mine.py:score, weight: 0.5}, "pkg.rewards:score", http://127.0.0.1:1/score, model]'
    edited(better, ("reward: reward", f"reward: {several}"))
    job = jobs.load(Path("edited.yaml"))
    paths = [source.path for source in job.phases["ppo"].rewards]
    assert paths == [
        "reward",
        f"{better}/mine.py:score",
        "pkg.rewards:score",
        "http://127.0.0.1:1/score",
        f"{better}/model",
    ]
    again = better / "resolved.yaml"
    again.write_text(jobs.dump(job))
    assert jobs.differences(job, jobs.read(again)) == []
    phase = with_its_start(job.phases["ppo"], RunFolder(better / "runs/better"))
    assert phase.rewards[0].path == phase.critic == str(better / "runs/better/reward/model")
    assert phase.rewards[1].path == f"{better}/mine.py:score"
    assert phase.model.path == str(better / "runs/better/sft/model")


def test_without_a_reward_model_the_critic_starts_from_the_policy(better):
    edited(better, ("reward: reward", "reward: mine.py:score"))
    phase = with_its_start(jobs.load(Path("edited.yaml")).phases["ppo"], RunFolder(better / "runs/better"))
    assert phase.critic == phase.model.path == str(better / "runs/better/sft/model")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "reward: reward",
            "reward: rewrd",
            '"rewrd" is no phase of this job, no run and no model folder; did you mean reward?',
        ),
        ("reward: reward", "reward: sft", "`sft` ends with a language model, not with a reward model"),
        ("reward: reward", "reward: ppo", '"ppo" comes later'),
        ("reward: reward", "reward: yours.py:score", "there is no file"),
        ("reward: reward", "rewards: reward", "unknown key; did you mean reward?"),
        ("from: sft", "from: reward", "`reward` ends with a reward model, ppo needs a language model"),
        ("response_tokens: 6", "response_tokens: 0", "response_tokens"),
        (
            "response_tokens: 6",
            "response_tokens: 5000",
            "edited.yaml:20: phases.ppo.response_tokens: the longest prompt and",
        ),
        ("batch: 2\n    response", "batch: 5\n    response", "an iteration has 4 responses"),
        ("response_tokens: 6", "response_tokens: 6\n    critic: nowhere", '"nowhere" is no phase of this job'),
        ("max_length: 24}", "max_length: 24, overlong: truncate}", "data.overlong"),
        ("data/prompts.jsonl", "data/train_.jsonl", "data/train_.jsonl"),
        *[
            ("response_tokens: 6", f"response_tokens: 6\n    groups: {groups}", message)
            for groups, message in {
                "[{roles: [policy, critic, critic], workers: 1}]": (
                    "one group; reference is named in none, critic is named 2 times, reward is named in none"
                ),
                "[{roles: [policy, reference, critic, reward], workers: 1}, {roles: [critic], workers: 1}]": (
                    "critic is named 2 times"
                ),
                "[{roles: [policy, reference, critic, reward, judge], workers: 1}]": "judge",
                "[{roles: [policy, reference, critic, reward], workers: 3}]": "cannot be dealt to 3 workers",
                "[]": "groups",
            }.items()
        ],
    ],
)
def test_what_is_wrong_is_told(better, muster, old, new, message):
    assert message in "\n".join(refused(muster, better, edited(better, (old, new))))


def test_a_whole_job_runs(better, muster):
    result = muster("run", "better.yaml", "--inline")
    assert result.status == 0, "\n".join(result.errors) + result.out
    folder = better / "runs/better/ppo"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert {"reward", "kl", "policy_loss", "value_loss", "entropy", "clip_fraction", "response_tokens"} <= rows[
        0
    ].keys()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    assert {"step", "row", "response", "reward", "kl"} <= samples[0].keys()
    assert (folder / "model/model.safetensors").is_file()


ALONE = """\
name: alone
model: {path: model, dtype: fp32}
resources: {workers: 1, threads: 1, gpus_per_worker: 0}
phases:
  ppo:
    reward: [{path: URL, timeout: 2}]
    critic: model
    data: {train: data/prompts.jsonl, max_length: 24}
    rollout_batch: 4
    batch: 2
    response_tokens: 6
    max_steps: 3
"""


def test_an_endpoint_that_cuts_its_replies_ends_no_run(better, muster):
    good = whole({"scores": [0.0, 1.0, 0.5, 0.25]})
    cut = [CUT[name] for name in ("a body that is cut", "no HTTP", "a chunk of no length")]
    with RawServer(good, cut[0], good, *cut[1:], good) as server:
        (better / "alone.yaml").write_text(ALONE.replace("URL", server.url))
        result = muster("run", "alone.yaml", "--inline")
    assert result.status == 0, "\n".join(result.errors) + result.out
    assert server.asked == 3 + len(cut)
    rows = [json.loads(line) for line in (better / "runs/alone/ppo/metrics.jsonl").open()]
    assert [row["reward"] for row in rows] == [0.4375] * 3


def test_a_part_of_the_schedule_leaves_the_rest_as_ppo_has_it(better):
    edited(better, ("    from: sft\n", "    from: sft\n    schedule: {warmup: 5}\n"))
    schedule = jobs.load(Path("edited.yaml")).phases["ppo"].schedule
    assert (schedule.name, schedule.warmup) == ("constant", 5)
