"""The prompts of `muster generate`: from the command line, a file or standard input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data import files, questions
from training.data.files import DataFile, Part, Row
from training.data.formats import Chat, Parser, Prompt
from training.data.row_errors import RowError
from training.errors import InputError, Problem

SHOWN_PROBLEMS = 20
_PROMPTS = {name: Parser("prompts", {"prompt": name}, ("prompts",)) for name in ("prompt", "messages")}


@dataclass(frozen=True)
class Given:
    """A prompt."""

    where: str
    """The row: `questions.jsonl:7`."""
    content: str | Chat
    beside: dict[str, Any] = field(default_factory=dict)
    """`expected`, where the row has an answer of its own."""
    system: str = ""
    """A system message beside a text."""

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.content, self.system)

    @property
    def row(self) -> dict[str, Any]:
        """As it is shown beside the response."""
        return {"prompt": self.content.messages if isinstance(self.content, Chat) else self.content, **self.beside}


def given(texts: Sequence[str], file: Path | None, limit: int | None) -> list[Given]:
    """The prompts of the command line, then those of a file. Raises InputError with the rows that hold none."""
    if not all(texts):
        raise InputError.of("command line", "a prompt is empty; give it some text", "--prompt")
    found = [Given("--prompt", text) for text in texts] + (_read(file, limit) if file is not None else [])
    if not found:
        raise InputError.of(str(file), "holds no rows")
    return found


def typed(lines: Iterable[str]) -> Iterator[Given]:
    """Every line that holds something."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Given(f"stdin:{number}", line.rstrip("\r\n"))


def _read(file: Path, limit: int | None) -> list[Given]:
    if not file.exists():
        raise InputError.of(str(file), "no such file")
    found: list[Given] = []
    problems: list[Problem] = []
    for row in (row for part in _parts(file) for row in files.rows(part)):
        if len(found) == limit or len(problems) == SHOWN_PROBLEMS:
            break
        try:
            found.append(_of_row(row))
        except RowError as error:
            problems.append(Problem(row.where, "", str(error)))
    if problems:
        raise InputError(problems)
    return found


def _parts(file: Path) -> Sequence[Part]:
    """The file, or those of a folder. One whose name does not say what it is holds JSON lines."""
    known = (*files.DATA_SUFFIXES, *files.FOREIGN)
    if file.is_file() and not file.name.endswith(known):
        return (DataFile(str(file), str(file)),)
    return questions.find_source(str(file)).parts


def _of_row(read: Row) -> Given:
    """Raises RowError."""
    where, row = read.where, read.value
    if isinstance(row, RowError):
        raise row
    for name, parse in _PROMPTS.items():
        if isinstance(row.get(name), list):
            return _conversation(read, {**row, name: list(row[name])}, name, parse)
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        system = row.get("system")
        return Given(where, row["prompt"], _expected(row), system if isinstance(system, str) else "")
    raise RowError("expected a row with a text `prompt` that is not empty, or a list of messages")


def _conversation(read: Row, row: dict[str, Any], name: str, parse: Parser) -> Given:
    """An answer at its end, as rows to learn from have it, is what is expected."""
    expected, last = _expected(row), row[name][-1] if row[name] else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        answer = row[name].pop().get("content")
        expected = {"expected": answer} if answer else {}
    _, example = parse(row, from_arrow=read.from_arrow)
    assert isinstance(example, Prompt)
    return Given(read.where, example.content, expected)


def _expected(row: Mapping[str, Any]) -> dict[str, Any]:
    return next(({"expected": row[key]} for key in ("answer", "completion") if row.get(key) not in (None, "")), {})
