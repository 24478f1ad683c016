"""Questions with known answers, from files of rows: what an evaluation asks. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from training.config import Phase
from training.data import files
from training.data.files import Located, Row, describe
from training.data.final_answers import as_verdict, expected_answer
from training.data.formats import Chat, Parser, Prompt, critique_request
from training.data.row_errors import RowError
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
    """The question; of a conversation what the user says last."""
    expected: str
    full_prompt: Prompt | None = None
    """What is put to the model, if that is more than the text."""

    @property
    def prompt(self) -> Prompt:
        return self.full_prompt or Prompt(self.text)


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


def find_source(path: str) -> Located:
    """The file of questions, or the files of a folder. Raises InputError."""
    (source,) = files.expand(path, Path.cwd(), what="", split="")
    return source


def _read(path: str, limit: int | None, parse: Callable[[Row], Question]) -> list[Question]:
    found: list[Question] = []
    problems: list[Problem] = []
    for row in islice((row for part in find_source(path).parts for row in files.rows(part)), limit):
        try:
            found.append(parse(row))
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


def _question(read: Row, columns: Mapping[str, str], answers: bool) -> Question:
    row = _row_value(read)
    names = (columns["question"],) if "question" in columns else QUESTION
    name = next((name for name in names if row.get(name) is not None), None)
    answered = (columns["answer"],) if "answer" in columns else ANSWER
    has_chat = name is None and "question" not in columns and not _CHATS.keys().isdisjoint(row)
    if has_chat or (name is not None and isinstance(row[name], list)):
        prompt, given = _conversation(read, row, name)
        text = prompt.messages[-1]["content"]
        full_prompt: Prompt | None = Prompt(prompt)
        row = row if given is None or any(row.get(each) is not None for each in answered) else {answered[0]: given}
    else:
        text, system = question_text(row, names), row.get("system")
        full_prompt = Prompt(text, system) if isinstance(system, str) and system else None
    expected = expected_answer(column(row, "answer", answered)) if answers else ""
    return Question(read.where, text, expected, full_prompt)


def _row_value(read: Row) -> Mapping[str, Any]:
    """The row. Raises RowError for one that cannot be read."""
    if isinstance(read.value, RowError):
        raise read.value
    return read.value


def question_text(row: Mapping[str, Any], names: tuple[str, ...] = QUESTION) -> str:
    """The question of a row that has it as text: of an instruction with its input,
    as rows to learn from have it. Raises RowError."""
    text = column(row, "question", names)
    is_instruction = next(name for name in names if row.get(name) is not None) == "instruction"
    extra = row.get("input") if is_instruction else None
    return f"{text}\n{extra}" if isinstance(extra, str) and extra else text


_CHATS = {
    name: Parser(format, {}, (format,)) for name, format in (("messages", "messages"), ("conversations", "sharegpt"))
}
"""Readers of rows to learn from, by the column that holds the conversation."""


def _conversation(read: Row, row: Mapping[str, Any], name: str | None) -> tuple[Chat, str | None]:
    """What is asked, and the answer at its end if there is one."""
    if name is not None:
        _, prompt = Parser("prompts", {"prompt": name}, ("prompts",))(row, from_arrow=read.from_arrow)
        assert isinstance(prompt, Prompt)
        assert isinstance(prompt.content, Chat)
        return prompt.content, None
    parse = next(parse for column, parse in _CHATS.items() if column in row)
    _, chat = parse(row, from_arrow=read.from_arrow)
    assert isinstance(chat, Chat)
    last = chat.loss_turns[-1]
    return Chat(chat.messages[:last], (), chat.tools), chat.messages[last]["content"]


def _verdict(read: Row) -> Question:
    row = _row_value(read)
    question, answer = column(row, "question", QUESTION[:3]), column(row, "answer", ANSWER[:1])
    if row.get("verdict") is None:
        raise RowError(f"missing column `verdict`; the row has {', '.join(row)}")
    said = as_verdict(row["verdict"])
    if said is None:
        raise RowError(f"column `verdict`: expected right or wrong, got {describe(row['verdict'])}")
    return Question(read.where, critique_request(question, answer), said)


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
