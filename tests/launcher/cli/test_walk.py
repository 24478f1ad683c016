"""docs/walk.md, command by command as the page has them, with fewer steps: everything in it works,
and what it says comes true."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.long, pytest.mark.timeout(3600)]

PAGE = Path(__file__).parents[3] / "docs" / "walk.md"
SUMS = ["phases.sft.max_steps=500", "phases.reward.max_steps=250", "phases.ppo.max_steps=24"]
FASTER = {
    "run pretrain.yaml": ["phases.pretrain.max_steps=200"],
    "run teacher.yaml": ["phases.cft.max_steps=200", "phases.cft.eval_every=200"],
    "run teacher.yaml name=word-student": ["phases.cft.max_steps=50"],
    "critique": ["--limit", "200"],
    "run ppo.yaml": SUMS,  # with every --only the same job
}
"""What is laid over the commands of the page, by how they begin; the longest beginning counts."""


def commands() -> Iterator[list[str]]:
    """Of the page's blocks, as words: lines that begin with `$`, and those after a backslash."""
    for block in re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for found in re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE):
            yield shlex.split(found.replace("\\\n", " "))


def faster(words: list[str]) -> list[str]:
    fitting = [beginning for beginning in FASTER if " ".join(words).startswith(beginning)]
    return words + FASTER[max(fitting, key=len)] if fitting else words


class Walker:
    """Where the commands run, and what they have said."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.said: dict[str, str] = {}

    def go(self, words: list[str]) -> None:
        if words[0] == "cd":
            self.folder /= words[1]
            return
        assert words[0] == "muster", words
        command = [sys.executable, "-m", "launcher", *faster(words[1:])]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        self.said[" ".join(words[1:])] = done.stdout

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def measured(self, phase: str, metric: str) -> list[float]:
        """Of a RUN/PHASE, in the order of the steps."""
        return [row[metric] for row in self.rows(f"runs/{phase}/metrics.jsonl") if metric in row]

    def accuracy(self, model: str) -> float:
        """As `muster eval` on the page has told it."""
        said = next(text for command, text in self.said.items() if command.startswith(f"eval {model} --data"))
        found = re.search(r"accuracy ([\d.]+)%", said)
        assert found, said
        return float(found[1]) / 100


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    walker = Walker(tmp_path_factory.mktemp("walk"))
    for words in commands():
        walker.go(words)
    return walker


def test_every_phase_of_the_page_is_finished(walker):
    finished = {
        f"{run.name}/{event['phase']}"
        for run in (walker.folder / "runs").iterdir()
        for event in walker.rows(f"runs/{run.name}/events.jsonl")
        if event["event"] == "phase_finished"
    }
    assert finished == {
        "word-texts/pretrain", "word-problems/sft", "word-adapters/sft", "word-teacher/cft", "word-student/cft",
        "sums/sft", "sums/reward", "sums/ppo",
    }  # fmt: skip


def test_pretraining_learns_the_language_and_sft_to_answer(walker):
    losses = walker.measured("word-texts/pretrain", "loss")
    assert losses[0] > 5  # 6.2 is to know nothing of 512 tokens
    assert losses[-1] < 1  # most of what is left are the numbers of a question, which nobody can guess
    # 200 questions: three standard deviations of a difference are at most 0.15.
    # Measured: 0.05 and 0.76 after so few steps.
    assert walker.accuracy("runs/word-problems") > walker.accuracy("runs/word-texts") + 0.3


def test_critiques_are_checked_and_what_is_dropped_is_counted(walker):
    counts = json.loads((walker.folder / "data/made.jsonl.work/report.json").read_text())["rows"]
    kept, answers = walker.rows("data/made.jsonl"), walker.rows("data/made.jsonl.work/answers.jsonl")
    assert len(kept) == counts["kept"] > 50
    dropped = sum(count for why, count in counts.items() if why != "kept" and not why.startswith("verdict "))
    assert len(kept) + dropped == sum(bool(row["response"].strip()) for row in answers)
    truth = {row["prompt"]: row["answer"] for row in walker.rows("data/prompts.jsonl")}
    for row in kept:
        given = row["answer"].rpartition("#### ")[2].strip()
        assert (given == truth[row["question"]]) == (row["verdict"] == "right"), row
        assert row["critique"].endswith(f"Conclusion: {row['verdict']} [END]")
    assert {row["verdict"] for row in kept} == {"right", "wrong"}


def test_the_reward_model_orders_pairs_and_ppo_rises_under_a_bounded_kl(walker):
    # 200 held-out pairs: a standard deviation at one half is 0.035.
    assert walker.measured("sums/reward", "eval_accuracy")[-1] > 0.75  # measured: 0.97
    rewards, kl = walker.measured("sums/ppo", "reward"), walker.measured("sums/ppo", "kl")
    # In the first four the critic learns alone. 128 responses an iteration, scores spread by 8: four standard
    # deviations of a difference are 2. Measured: 4.1.
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 2
    assert max(kl) < 2  # nats a response, measured: 0.85. It does not run away from what it was
    # Two standard deviations of a difference between two accuracies on 200 questions. Measured: 0.46 and 0.65.
    assert walker.accuracy("runs/sums/ppo") > walker.accuracy("runs/sums/sft") + 0.1


def test_the_report_holds_every_run(walker):
    page = (walker.folder / "report.html").read_text(encoding="utf-8")
    assert all(run.name in page for run in (walker.folder / "runs").iterdir())
