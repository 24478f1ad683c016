"""Runs as Muster leaves them, written down without training: for tests of what looks at runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from launcher.jobfile import yaml_with_lines

BEGAN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
QUESTIONS = [f"Mia has {a} pens and buys {b}. How many has she now?" for a in range(2, 12) for b in range(3, 8)]


class MadeRun:
    """A run that is written event by event; its clock stands still until `wait`."""

    def __init__(self, root: Path, name: str, phases: dict[str, dict[str, Any]]):
        self.folder = root / name
        self.folder.mkdir(parents=True)
        self.now, self.attempt = BEGAN, 0
        self.chance = random.Random(name)
        settings = {
            phase: {"recipe": phase, "model": {"path": "/models/tiny"}, "data": {"train": "/data/train.jsonl"}, **given}
            for phase, given in phases.items()
        }
        job = {"name": name, "seed": 17, "storage": str(root), "phases": settings}
        (self.folder / "job.yaml").write_text(yaml_with_lines.dump(job))

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def event(self, kind: str, **fields: Any) -> None:
        row = {"time": self.now.isoformat(timespec="milliseconds"), "attempt": self.attempt, "event": kind, **fields}
        self._append(self.folder / "events.jsonl", row)

    def start(
        self,
        phase: str,
        workers: int = 4,
        *,
        by_itself: bool = False,
        step: int = 0,
        total: int = 400,
        redone_s: float = 0.0,
    ) -> None:
        """An attempt, up to its first step."""
        self.attempt += 1
        self.event(
            "started", host="head", pid=1, **({"by_itself": True} if by_itself else {"versions": {"torch": "2.13.0"}})
        )
        if not by_itself:
            self.event("phase_started", phase=phase)
        self.wait(20)
        members = [{"rank": rank, "machine": f"10.0.0.{rank + 1}", "pid": 100 + rank} for rank in range(workers)]
        self.event("workers", phase=phase, workers=members)
        self.wait(10)
        self.event(
            "training", phase=phase, step=step, redone_s=redone_s, total_steps=total, parameters=1_111_424,
            samples=5000, dtype="float32",
            device="cpu", attention="sdpa", notes=["3 samples were too long and left out"],
        )  # fmt: skip

    def steps(self, phase: str, first: int, last: int, workers: int = 4, **more: Any) -> None:
        for step in range(first, last + 1):
            self.wait(1.0)
            loss = 4 * math.exp(-step / 80) + 0.3 + self.chance.gauss(0, 0.05)
            row = {
                "step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 4000,
                "target_tokens": 2000,
                "samples": 64, "step_s": 0.9, "tokens_per_s": 4444.0, "memory_gib": 0.8, "workers": workers,
                "attempt": self.attempt,
            }  # fmt: skip
            self.metrics(phase, row | {key: value(step) for key, value in more.items()})

    def metrics(self, phase: str, row: dict[str, Any]) -> None:
        (self.folder / phase).mkdir(exist_ok=True)
        self._append(self.folder / phase / "metrics.jsonl", row)

    def save(self, phase: str, step: int) -> None:
        self.event("checkpoint", phase=phase, step=step, checkpoint=f"x/step-{step:08d}", seconds=0.5, stall_s=0.1)

    def evaluate(self, phase: str, step: int, skill: float, questions: Sequence[str] = QUESTIONS) -> None:
        """Answers to all questions, a `skill` part of them right."""
        rows = []
        for number, question in enumerate(questions):
            correct = self.chance.random() < skill
            rows.append(
                {
                    "number": number, "row": f"q:{number}", "question": question, "expected": "7", "sample": 0,
                    "response": f"so it is {7 if correct else 8}", "answer": "7", "correct": correct, "ended": True,
                    "tokens": 9,
                }
            )  # fmt: skip
        right = sum(row["correct"] for row in rows) / len(rows)
        self.metrics(
            phase,
            {
                "step": step, "eval_loss": 3 * math.exp(-step / 90) + 0.5, "eval_accuracy": right,
                "eval_accuracy_low": max(0.0, right - 0.1), "eval_accuracy_high": min(1.0, right + 0.1),
                "evaluation_s": 3.0, "attempt": self.attempt,
            },
        )  # fmt: skip
        (self.folder / phase / "answers").mkdir(parents=True, exist_ok=True)
        for row in rows:
            self._append(self.folder / phase / "answers" / f"step-{step:08d}.jsonl", row)
        self.wait(3)

    def fail(self, phase: str, step: int, checkpoint: int, *, retry: bool = True) -> None:
        self.wait(2)
        self.event(
            "incident", phase=phase, **{"class": "killed"}, message="was killed by SIGKILL", step=step,
            checkpoint=checkpoint, rank=1, node="10.0.0.2", retry=retry, why="7 retries left until the next checkpoint",
        )  # fmt: skip
        self.wait(5)

    def finish(self, phase: str, step: int) -> None:
        self.event("phase_finished", phase=phase, checkpoint=f"x/step-{step:08d}", model=f"{self.folder}/{phase}/model")
        self.event("done")

    @staticmethod
    def _append(path: Path, row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def finetuned(root: Path, name: str, recipe: str = "sft", skill: float = 0.9) -> MadeRun:
    """400 steps, a killed worker after step 157 whose machine does not come back."""
    run = MadeRun(root, name, {recipe: {"max_steps": 400}})
    run.start(recipe)
    run.evaluate(recipe, 0, 0.05)
    run.steps(recipe, 1, 100)
    run.evaluate(recipe, 100, skill / 2)
    run.save(recipe, 100)
    run.wait(57)
    run.fail(recipe, step=157, checkpoint=100)
    run.start(recipe, 3, by_itself=True, step=100)
    for first in (101, 201, 301):
        run.steps(recipe, first, first + 99, 3)
        run.evaluate(recipe, first + 99, skill * (0.8 + first / 1500))
        run.save(recipe, first + 99)
    run.finish(recipe, 400)
    return run


def rewarded(root: Path, name: str = "rewarded", iterations: int = 60) -> MadeRun:
    """PPO, undisturbed."""
    run = MadeRun(root, name, {"ppo": {"reward": "rules.py:score"}})
    run.start("ppo", total=iterations)
    run.steps(
        "ppo", 1, iterations, reward=lambda step: step / 30 - 1, kl=lambda step: step / 100,
        entropy=lambda step: 2 - step / 60,
        generate_s=lambda _: 0.4, score_s=lambda _: 0.1, learn_s=lambda _: 0.3,
        response_tokens=lambda step: 20 + step / 10,
    )  # fmt: skip
    for step in range(1, iterations + 1):
        for place, reward in enumerate((-1.0, 2.0, 0.5, 0.25)):
            run._append(
                run.folder / "ppo" / "samples.jsonl",
                {
                    "step": step, "row": {"prompt": f"{step}+{place}="}, "sample": 0, "response": f"{step + place}",
                    "reward": reward + step / 100, "kl": 0.2, "ended": place != 3,
                },
            )  # fmt: skip
    run.save("ppo", iterations)
    run.finish("ppo", iterations)
    return run
