"""Rows of CSV, TSV and Arrow files, one after the other; memory does not grow with the file.

A cell of CSV or TSV is text, whatever it looks like: 007 is not 7.
Only a cell that holds messages as JSON becomes those messages.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from training.data.files import PARQUET_BATCH_ROWS, Numbered, one_line
from training.data.row_errors import RowError, UnreadableFile

MAX_CELL = 64 << 20
"""Characters. More in one cell means that a quote was never closed."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
FEATHER_V1 = b"FEA1"
ARROW_FILE = b"ARROW1"


def separated(stream: BinaryIO, separator: str) -> Numbered:
    """The rows of a CSV file (RFC 4180) or a TSV file with a header, numbered by the line on which each begins."""
    csv.field_size_limit(MAX_CELL)
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        first = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            broken = _broken(error)
            yield first, broken
            if isinstance(broken, UnreadableFile):
                return
            continue
        if not cells:
            continue
        if names is None:
            names = _header(cells, separator, first)
            continue
        yield first, _row(names, cells, separator)


class _Lines:
    """The lines of a file as text, counted. Bytes that are not UTF-8 become surrogates: the row that has them tells."""

    def __init__(self, stream: Iterable[bytes]):
        self._lines = iter(stream)
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if self.number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UnreadableFile("the file is UTF-16, not UTF-8; save it as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        return line.decode("utf-8", "surrogateescape")


def _broken(error: csv.Error) -> RowError:
    text = one_line(error)
    if "unexpected end of data" in text or "field larger" in text:
        return UnreadableFile("a quote that opens in this row is never closed; the rest of the file cannot be read")
    if "new-line character" in text:
        return UnreadableFile("lines end with a carriage return alone; save the file with line feeds")
    return RowError(f"broken CSV: {text}; in a quoted field a quote is written twice")


def _header(cells: list[str], separator: str, line: int) -> list[str]:
    """The names of the columns. Raises UnreadableFile if they cannot be those of rows."""
    if len(cells) == 1 and (other := next((one for one in SEPARATORS if one in cells[0]), None)):
        raise UnreadableFile(
            f"the header is one column, `{cells[0]}`: the fields seem to be separated by {SEPARATORS[other]}, and are "
            f"read as separated by {SEPARATORS[separator]}; .csv files need commas, .tsv files tabs",
            line,
        )
    if _not_utf8(cells):
        raise UnreadableFile("the header is not UTF-8; convert the file to UTF-8", line)
    names = [cell.strip() for cell in cells]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        message = f"the header names a column twice: {', '.join(twice)}; the first line must name the columns"
        raise UnreadableFile(message, line)
    return names


def _row(names: list[str], cells: list[str], separator: str) -> dict[str, Any] | RowError:
    if len(cells) != len(names):
        advice = f"quote fields that contain {SEPARATORS[separator]} or line breaks"
        return RowError(f"expected {len(names)} fields as in the header, got {len(cells)}; {advice}")
    if _not_utf8(cells):
        return RowError("not UTF-8; convert the file to UTF-8")
    return dict(zip(names, map(_value, cells), strict=True))


def _not_utf8(cells: list[str]) -> bool:
    try:
        for cell in cells:
            cell.encode()
    except UnicodeEncodeError:
        return True
    return False


def _value(cell: str) -> Any:
    """The cell's text, or the messages that are in it."""
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    messages = value if isinstance(value, list) else [value]
    return value if messages and all(map(_is_message, messages)) else cell


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= value.keys())


def arrow(stream: BinaryIO) -> Numbered:
    """The rows of an Arrow file, in the format of streams (as `datasets` writes) or of files (Feather version 2)."""
    import pyarrow as pa

    read = 0
    try:
        for batch in _batches(stream):
            for start in range(0, len(batch), PARQUET_BATCH_ROWS):
                yield from enumerate(batch.slice(start, PARQUET_BATCH_ROWS).to_pylist(), start=read + 1)
                read += min(PARQUET_BATCH_ROWS, len(batch) - start)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableFile(f"broken Arrow: {one_line(error)}", read + 1) from None


def _batches(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.ipc as ipc

    magic = stream.read(len(ARROW_FILE))
    stream.seek(0)
    if magic.startswith(FEATHER_V1):
        raise UnreadableFile("Feather version 1; write it as Parquet: pandas.read_feather(...).to_parquet(...)")
    if magic == ARROW_FILE:
        with ipc.open_file(stream) as reader:
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        with ipc.open_stream(stream) as reader:
            yield from reader
