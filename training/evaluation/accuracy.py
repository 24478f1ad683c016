"""Computes accuracy with its confidence interval, and pass@k, from graded responses. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""One response: number and row of the question, question, expected, sample, response, answer,
correct, ended, tokens."""


@dataclass(frozen=True)
class Answers:
    """What came of one call of a worker that answers questions."""

    rows: Mapping[str, list[Row]]
    """Judged responses, by what they are measured as."""
    is_last: bool


def in_order(shares: Sequence[Sequence[Row]]) -> list[Row]:
    """The responses of all workers, question by question."""
    return sorted((row for share in shares for row in share), key=lambda row: (row["number"], row["sample"]))


def measured(rows: Sequence[Row], prefix: str = "eval_") -> dict[str, float]:
    """Accuracy over all responses with its 95 % interval; pass@k of k responses each; how responses end."""
    by_question: dict[int, list[bool]] = {}
    for row in rows:
        by_question.setdefault(row["number"], []).append(row["correct"])
    count, samples = len(by_question), len(next(iter(by_question.values())))
    accuracy = sum(row["correct"] for row in rows) / len(rows)
    low, high = interval(accuracy * count, count)  # responses to one question are no independent trials
    found = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    if samples > 1:
        found[f"pass@{samples}"] = sum(pass_at(samples, samples, sum(each)) for each in by_question.values()) / count
    found["eos_rate"] = sum(row["ended"] for row in rows) / len(rows)
    found["response_tokens"] = sum(row["tokens"] for row in rows) / len(rows)
    return {f"{prefix}{name}": value for name, value in found.items()}


def interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, JASA 22, 1927): it stays inside 0 to 1 and is honest for few trials."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(k: int, samples: int, correct: int) -> float:
    """Chance that one of k answers, drawn from `samples` of which `correct` are right, is right (arXiv:2107.03374)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))
