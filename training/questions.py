"""Questions with known answers, from files of rows: what an evaluation asks. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from training.answers import as_verdict, expected_answer
from training.config import Phase
from training.data import files
from training.data.files import RowError, describe
from training.data.formats import critique_request
from training.errors import InputError, Problem

QUESTION = ("question", "problem", "prompt", "instruction")
ANSWER = ("answer", "expected", "solution", "completion", "output")
"""What data sets call their columns, the likeliest first."""
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer to compare with."""

    where: str
    """The row: `data/eval.jsonl:7`."""
    text: str
    expected: str


def read(
    path: str, columns: Mapping[str, str] | None = None, limit: int | None = None, *, answers: bool = True
) -> list[Question]:
    """The questions of a file. Raises InputError with the rows that lack a question or, if `answers`, an answer."""
    return _read(path, limit, lambda row: _question(row, columns or {}, answers))


def read_verdicts(path: str, limit: int | None = None) -> list[Question]:
    """Answers to be critiqued: rows of question, answer and verdict. Raises InputError."""
    return _read(path, limit, _verdict)


def check(phase: Phase) -> None:
    """Raises InputError with the rows that a phase cannot be evaluated with."""
    if phase.eval is not None:
        read(phase.eval.data, phase.eval.columns, phase.eval.limit)
        if phase.eval.verdicts is not None:
            read_verdicts(phase.eval.verdicts, phase.eval.limit)


def _read(path: str, limit: int | None, parse: Callable[[Mapping[str, Any]], tuple[str, str]]) -> list[Question]:
    (source,) = files.expand(path, Path.cwd(), what="", split="")
    found: list[Question] = []
    problems: list[Problem] = []
    for row in islice((row for part in source.parts for row in files.rows(part)), limit):
        try:
            if isinstance(row.value, RowError):
                raise row.value
            found.append(Question(row.where, *parse(row.value)))
        except RowError as error:
            problems.append(Problem(row.where, "", str(error)))
        if len(problems) == SHOWN_PROBLEMS:
            problems.append(Problem(path, "", "later rows were not looked at"))
            break
    if problems:
        raise InputError(problems)
    if not found:
        raise InputError.of(path, "holds no rows")
    return found


def _question(row: Mapping[str, Any], columns: Mapping[str, str], answers: bool) -> tuple[str, str]:
    text = column(row, "question", (columns["question"],) if "question" in columns else QUESTION)
    if not answers:
        return text, ""
    expected = column(row, "answer", (columns["answer"],) if "answer" in columns else ANSWER)
    return text, expected_answer(expected)


def _verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    question, answer = column(row, "question", QUESTION[:3]), column(row, "answer", ANSWER[:1])
    if row.get("verdict") is None:
        raise RowError(f"missing column `verdict`; the row has {', '.join(row)}")
    said = as_verdict(row["verdict"])
    if said is None:
        raise RowError(f"column `verdict`: expected right or wrong, got {describe(row['verdict'])}")
    return critique_request(question, answer), said


def column(row: Mapping[str, Any], what: str, names: tuple[str, ...]) -> str:
    """The first of these columns that a row has, as text. Raises RowError if it has none, or no text in it."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        advice = f"looked for {', '.join(names)}; the row has {', '.join(map(str, row)) or 'no columns'}"
        raise RowError(f"no {what}: {advice}")
    value = row[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"column `{name}`: expected text or a number, got {describe(value)}")
    if not str(value).strip():
        raise RowError(f"column `{name}` is empty")
    return str(value)
