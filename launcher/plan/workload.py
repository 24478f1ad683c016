"""Estimates the amount of data of a phase: the number of rows, and the lengths of a few hundred of them.
Unknown values are assumed, with a note."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from launcher.plan.step_time import Work
from training.config import Phase
from training.data import files, questions
from training.data.files import DataFile, HubSplit, Part
from training.data.formats import critique_request
from training.data.phase_data import sources_of
from training.data.row_errors import RowError
from training.errors import InputError
from training.model_folder import tokenizer_of
from training.recipes import RECIPES

_LOOKED_AT = 200
"""Number of rows of a file whose lengths are measured."""
_BYTES_A_TOKEN = 3.6
"""Approximate value for English text and mathematics."""
_COUNTED_BYTES = 2 << 30
"""The number of lines of larger files is estimated."""


def work_of(
    phase: Phase, *, rows: int | None = None, tokens: float | None = None, response: float | None = None
) -> Work:
    """Return the amount of work. Given values are used as they are."""
    seen_rows, seen_tokens, notes = (None, None, []) if rows is not None and tokens is not None else _seen(phase)
    longest = phase.sequences_per_sample * phase.data.max_length
    if tokens is not None and tokens > longest:
        notes.append(f"{tokens:g} tokens exceed data.max_length; the plan uses {longest}")
        tokens = longest
    if tokens is None:
        tokens = min(seen_tokens, longest) if seen_tokens is not None else longest / 2
        if seen_tokens is None:
            notes.append(
                f"the plan assumes {tokens:g} tokens per sample, half of data.max_length; give the mean with --tokens"
            )
    answer = 0.0
    if phase.rollout is not None:
        answer = min(float(response if response is not None else phase.new_tokens), phase.new_tokens)
        if response is None:
            notes.append(
                f"the plan assumes responses of the maximum length, {phase.new_tokens} tokens; give the mean with "
                "--response-tokens"
            )
    return Work(rows=rows if rows is not None else seen_rows, tokens=tokens, response=answer, note="; ".join(notes))


def _seen(phase: Phase) -> tuple[int | None, float | None, list[str]]:
    """Return the number of rows, their mean number of tokens, and notes on what is unknown."""
    try:
        located = sources_of(phase, held_out=False)
    except InputError as error:
        reasons = "; ".join(problem.message for problem in error.problems)
        return None, None, [f"data.train cannot be read ({reasons})"]
    parts = [part for source in located for part in source.parts]
    away = [part.shown for part in parts if isinstance(part, HubSplit) or "://" in part.path]
    if away:
        return (
            None,
            None,
            [f"{', '.join(away)}: not on this machine, so the number of rows is unknown; give it with --rows"],
        )
    encode = _encoder(phase)
    # What is put around the columns of critique data.
    frame = encode(critique_request("", "")) if RECIPES[phase.recipe].learns_critiques else 0
    count, tokens, looked_at = 0, 0.0, 0
    for part in parts:
        rows, own_tokens, own_rows = _of_file(part, encode, phase)
        count, tokens, looked_at = count + rows, tokens + own_tokens, looked_at + own_rows
    return count, frame + tokens / max(1, looked_at), []


def rows_in(path: str) -> int | None:
    """Return the number of rows of a file or folder of questions; None if it is not on this machine."""
    try:
        source = questions.find_source(path)
    except InputError:
        return None
    here = [part for part in source.parts if isinstance(part, DataFile) and "://" not in part.path]
    if len(here) < len(source.parts):
        return None
    return sum(_rows(part, len(list(itertools.islice(files.rows(part), _LOOKED_AT)))) for part in here)


def _encoder(phase: Phase) -> Any:
    """Return a function that counts tokens: with the model's tokenizer.json if it is local, else by text length."""
    file = Path(tokenizer_of(phase.model)) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: len(tokenizer.encode(text).ids)
    return lambda text: len(text.encode()) / _BYTES_A_TOKEN


def _of_file(part: Part, encode: Any, phase: Phase) -> tuple[int, float, int]:
    """Return the number of rows of a file, the tokens of the measured rows, and the number of those."""
    assert isinstance(part, DataFile), "hub splits are not opened"
    looked_at, read, tokens = 0, 0, 0.0
    reader = files.rows(part)
    for row in itertools.islice(reader, _LOOKED_AT):
        read += 1
        if isinstance(row.value, RowError):
            continue
        looked_at += 1
        told = _learnt(row.value, phase)
        tokens += sum(encode(text) for text in _texts(told))
        if phase.sequences_per_sample > 1:  # what was asked stands before both answers
            tokens += sum(encode(text) for text in _texts([told.get("prompt"), told.get("conversations")]))
    return _rows(part, read), tokens, looked_at


_COLUMNS = frozenset(
    [
        "text",
        "prompt",
        "completion",
        "question",
        "answer",
        "critique",
        "instruction",
        "input",
        "output",
        "system",
        "messages",
        "conversations",
        "chosen",
        "rejected",
    ]
)
"""Of all formats: others are not learnt."""


def _learnt(row: dict[str, Any], phase: Phase) -> dict[str, Any]:
    """The columns that make the sample; all of them if none has a known name. Of a prompt the answer is not read."""
    named = set(phase.data.columns.values())
    wanted = (_COLUMNS - {"answer", "completion"} if phase.rollout is not None else _COLUMNS) | named
    chosen = {name: value for name, value in row.items() if name in wanted}
    return chosen or row


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _texts(each)]


def _rows(part: DataFile, read: int) -> int:
    """All rows of a file of which the first were read."""
    if read < _LOOKED_AT:
        return read
    if part.path.endswith(".parquet"):
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(part.path).metadata.num_rows)
    if part.path.endswith((".jsonl", ".ndjson")):
        size = os.path.getsize(part.path)
        lines = seen = 0
        with open(part.path, "rb") as stream:
            while seen < _COUNTED_BYTES and (block := stream.read(1 << 24)):
                lines, seen = lines + block.count(b"\n"), seen + len(block)
        return round(lines * size / seen)
    return sum(1 for _ in files.rows(part))
