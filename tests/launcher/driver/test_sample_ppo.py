"""The sample job of PPO learns: accuracy by a checker that nobody was trained on rises far beyond chance."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("seed", [17, 18])
def test_a_policy_learns_from_a_reward_model_that_saw_pairs_alone(tmp_path, seed):
    def muster(*words: str) -> None:
        command = [sys.executable, "-m", "launcher", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr

    muster("init", ".")
    muster("run", "ppo.yaml", "--inline", f"seed={seed}", "resources.workers=1")
    asked = ("--data", "data/sums/eval.jsonl", "--temperature", "1", "--max-new-tokens", "40")
    muster("eval", "runs/sums/sft", *asked, "--out", "before.jsonl")
    before = [json.loads(line)["correct"] for line in (tmp_path / "before.jsonl").open()]
    rows = [json.loads(line) for line in (tmp_path / "runs/sums/ppo/metrics.jsonl").open()]
    after = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1]
    # 200 questions: a standard deviation is 3.5 points at one half. Measured: see the README.
    assert 0.45 < sum(before) / len(before) < 0.7
    assert after > 0.85
    assert max(row["kl"] for row in rows if "kl" in row) < 2
