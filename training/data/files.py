"""From what the job file names to a stream of rows: finds the files and reads them. Knows nothing of what a row means.

Local files and any fsspec address (`s3://...`) are read alike: JSON lines, a JSON array, CSV, TSV, all of these also as
`.gz`; Parquet, Arrow, a folder that `datasets.save_to_disk` wrote; where documents are wanted, also `.txt` and `.md`,
of which each file is one. A name such as `openai/gsm8k`, where no such path exists, is a data set on the Hugging Face
hub.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec

from training.config import Source
from training.data import saved_datasets
from training.data.datasets_compat import fingerprint
from training.data.row_errors import RowError, UnreadableFile
from training.errors import InputError, Problem
from training.io.paths import absolute

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SEPARATED = {".csv": ",", ".tsv": "\t"}
ARROW_SUFFIXES = (".arrow", ".feather")
_ROW_SUFFIXES = (*JSON_SUFFIXES, *SEPARATED)
DATA_SUFFIXES = (*_ROW_SUFFIXES, *(suffix + ".gz" for suffix in _ROW_SUFFIXES), ".parquet", *ARROW_SUFFIXES)
TEXT_SUFFIXES = (".txt", ".md")
FOREIGN = {
    ".xlsx": "an Excel workbook; save the sheet as CSV (UTF-8)",
    ".xls": "an Excel workbook; save the sheet as CSV (UTF-8)",
    ".ods": "a spreadsheet; save the sheet as CSV (UTF-8)",
    ".pkl": "a pickle, which can run code and is not read; write the rows as Parquet: df.to_parquet(...)",
    ".pickle": "a pickle, which can run code and is not read; write the rows as Parquet: df.to_parquet(...)",
    ".pt": "written by torch.save; write the rows as Parquet or JSON lines",
    ".npy": "a NumPy array; write the rows as Parquet or JSON lines",
    ".npz": "NumPy arrays; write the rows as Parquet or JSON lines",
    ".orc": "ORC; write it as Parquet",
    ".avro": "Avro; write it as Parquet",
    ".yaml": "YAML; write the rows as JSON lines",
    ".yml": "YAML; write the rows as JSON lines",
    ".zip": "an archive; unpack it and name the file or folder",
    ".tar": "an archive; unpack it and name the file or folder",
    ".tar.gz": "an archive; unpack it and name the file or folder",
    ".tgz": "an archive; unpack it and name the file or folder",
    ".bz2": "packed by bzip2; unpack it, or pack it by gzip",
    ".zst": "packed by Zstandard; unpack it, or pack it by gzip",
    ".xz": "packed by xz; unpack it, or pack it by gzip",
}
"""Kinds of files that are not read, and what to do with them."""
FOREIGN_SUFFIXES = (*TEXT_SUFFIXES, *FOREIGN, ".gz")
HUB_NAME = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")

ARRAY_CHUNK = 1 << 18  # characters read at once from a JSON array
ERROR_MARGIN = 16  # a JSON error this near to the end of the buffer may only mean that the rest is not read yet
PARQUET_BATCH_ROWS = 256
DOCUMENT_BYTES = 4 << 20
"""A text file that is longer is read as several documents, cut at line ends, so that it need not fit into memory."""
RACY_S = 2.0  # a file changed this recently may change again within the clock's grain


@dataclass(frozen=True)
class DataFile:
    """A file of rows."""

    path: str
    """Absolute path or fsspec address."""
    shown: str
    """The same as a person would write it: relative to the job file where it lies below."""

    @property
    def kind(self) -> str:
        """What the file is, for a report: `CSV`."""
        name, packed = self.path.removesuffix(".gz"), ", gzip" * self.path.endswith(".gz")
        return next(kind for suffixes, kind in _KINDS.items() if name.endswith(suffixes)) + packed


_KINDS: dict[tuple[str, ...], str] = {
    (".jsonl", ".ndjson"): "JSON lines",
    (".json",): "JSON",
    (".csv",): "CSV",
    (".tsv",): "TSV",
    (".parquet",): "Parquet",
    ARROW_SUFFIXES: "Arrow",
    TEXT_SUFFIXES: "text",
}


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the Hugging Face hub."""

    path: str
    name: str | None
    split: str
    revision: str | None = None

    @property
    def shown(self) -> str:
        revision = f"@{self.revision[:12]}" if self.revision else ""
        return f"{self.path}{revision}" + (f"[{self.name}]" if self.name else "") + f":{self.split}"

    @property
    def kind(self) -> str:
        return "Hugging Face hub"


Part = DataFile | HubSplit


@dataclass(frozen=True)
class Located:
    """A source of the job file, and where its rows are."""

    source: Source
    parts: tuple[Part, ...]
    """Files in the order in which they are read."""
    base: Path = Path()
    """What relative paths start at."""

    @property
    def has_splits(self) -> bool:
        """Whether it was a split that was chosen: of a data set on the hub, or in a folder of `save_to_disk`."""
        return isinstance(self.parts[0], HubSplit) or self.parts[0].path.endswith(".arrow")

    @property
    def shown(self) -> str:
        """As a person would write it."""
        if isinstance(self.parts[0], HubSplit):
            return self.parts[0].shown
        path = Path(self.source.path)
        below = "://" not in self.source.path and path.is_relative_to(self.base)
        return path.relative_to(self.base).as_posix() if below else self.source.path


class Row(NamedTuple):
    """One row as it was read."""

    part: Part
    number: int
    """From 1: the line of a JSONL file, else the row."""
    value: dict[str, Any] | RowError

    @property
    def where(self) -> str:
        return f"{self.part.shown}:{self.number}"

    @property
    def from_arrow(self) -> bool:
        """Whether the row comes from Arrow or Parquet, which give all objects of a column the same keys,
        null where there was none."""
        return isinstance(self.part, HubSplit) or self.part.path.endswith((".parquet", *ARROW_SUFFIXES))


# ── Finding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def expand(
    data: str | Sequence[str | Source],
    base: Path,
    where: str = "",
    what: str = "data",
    *,
    documents: bool = False,
    split: str = "train",
) -> list[Located]:
    """The sources that `data` names, with their files; relative paths start at `base`, the job file's folder.

    `documents`: text files count as well. `split`: of a folder with several splits, where the source names none; "": it
    has to. `where` and `what` (`job.yaml:14`, `phases.sft.data.train`) open every problem's text. Raises InputError
    with all that is missing, empty, unreadable or of an unknown kind.
    """
    items = [data] if isinstance(data, str) else data
    sources = [Source(path=item) if isinstance(item, str) else item for item in items]
    suffixes = DATA_SUFFIXES + (TEXT_SUFFIXES if documents else ())
    located, problems = [], _weight_problems(sources, where, what)
    for index, source in enumerate(sources):
        try:
            located.append(Located(source, _find(source, base.absolute(), suffixes, split), base.absolute()))
        except RowError as error:
            key = what if isinstance(data, str) else f"{what}[{index}]"
            problems.append(Problem(where, key, f"{source.path}: {error}"))
    if problems:
        raise InputError(problems)
    return located


def without_effect(sources: Sequence[Located]) -> list[str]:
    """Settings of sources that change nothing, in words."""
    notes = []
    for located in sources:
        source, is_file = located.source, isinstance(located.parts[0], DataFile)
        if is_file and source.name is not None:
            notes.append(f"{located.shown}: `name: {source.name}` changes nothing: it is for data sets on the hub")
        if is_file and not located.has_splits and source.split != "train":
            notes.append(f"{located.shown}: `split: {source.split}` changes nothing: these are files without splits")
    return notes


def _weight_problems(sources: Sequence[Source], where: str, what: str) -> list[Problem]:
    bare = [source.path for source in sources if source.weight is None]
    if not bare or len(bare) == len(sources):
        return []
    message = f"either every source has a weight or none has; without one: {', '.join(bare)}"
    return [Problem(where, what, message)]


def _find(source: Source, base: Path, suffixes: tuple[str, ...], split: str) -> tuple[Part, ...]:
    split = source.split if "split" in source.model_fields_set else split
    finder = _find_remote if "://" in source.path else _find_local
    parts = finder(source, base, suffixes, split)
    if source.revision is not None and not isinstance(parts[0], HubSplit):
        raise RowError("`revision` has no effect: this is no data set on the Hugging Face hub; leave it out")
    return parts


def _find_local(source: Source, base: Path, suffixes: tuple[str, ...], split: str) -> tuple[Part, ...]:
    path = base / os.path.expanduser(source.path)
    if path.is_dir():
        if (saved := saved_datasets.files_in(_LocalFolder(path), split)) is not None:
            return _checked([_local(path / name, base) for name in saved], "folder", suffixes)
        found = [_local(file, base) for file in sorted(path.iterdir()) if _is_data(file, suffixes)]
        return _checked(found, "folder", suffixes)
    if path.is_file():
        return _checked([_local(path, base)], "file", suffixes)
    if glob.has_magic(source.path):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return _checked([_local(match, base) for match in matches if _is_data(match, suffixes)], "glob", suffixes)
    if _may_be_hub(source.path):
        return (_hub_split(source),)
    raise RowError(f"no such file or folder{_nearby(path, base)}")


def _hub_split(source: Source) -> HubSplit:
    name, revision = hub_name(source.path)
    if None not in (revision, source.revision):
        raise RowError(f"the name says the revision {revision}, `revision` says {source.revision}; keep one")
    return HubSplit(name, source.name, source.split, revision or source.revision)


def hub_name(path: str) -> tuple[str, str | None]:
    """The data set that `owner/name` or `owner/name@revision` names, and its revision."""
    found = HUB_NAME.fullmatch(path)
    return (found["name"], found["revision"]) if found else (path, None)


def _local(path: Path, base: Path) -> DataFile:
    found = Path(absolute(path))
    shown = found.relative_to(base) if found.is_relative_to(base) else found
    return DataFile(str(found), shown.as_posix())


def _is_data(path: Path, suffixes: tuple[str, ...]) -> bool:
    is_rows = path.name.endswith(suffixes) and path.name not in ("dataset_info.json", "dataset_infos.json")
    return is_rows and not path.name.startswith(".") and path.is_file()


def _may_be_hub(path: str) -> bool:
    return HUB_NAME.fullmatch(path) is not None and not path.endswith(DATA_SUFFIXES + FOREIGN_SUFFIXES)


def _nearby(path: Path, base: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {path.parent})"
    close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f"; did you mean {_local(path.parent / close[0], base).shown}?" if close else f" in {path.parent}"


def _find_remote(source: Source, base: Path, suffixes: tuple[str, ...], split: str) -> tuple[Part, ...]:
    try:
        fs, root = fsspec.core.url_to_fs(source.path)
        if glob.has_magic(source.path):
            kind, names = "glob", [name for name in sorted(fs.glob(root)) if name.endswith(suffixes)]
        elif fs.isdir(root) and (saved := saved_datasets.files_in(_RemoteFolder(fs, root), split)) is not None:
            kind, names = "folder", [f"{root}/{name}" for name in saved]
        elif fs.isdir(root):
            kind, names = "folder", [name for name in sorted(fs.ls(root, detail=False)) if name.endswith(suffixes)]
        else:
            kind, names = "file", [root]
        sizes = [fs.size(name) for name in names]
    except RowError:
        raise
    except FileNotFoundError:
        raise RowError("no such file or folder") from None
    except Exception as error:  # a store's client may raise anything: no network, no credentials, no such package
        raise RowError(f"cannot be reached: {one_line(error)}") from error
    files = [DataFile(url, url) for url in map(fs.unstrip_protocol, names)]
    return _checked(files, kind, suffixes, sizes)


def _checked(
    files: list[DataFile], kind: str, suffixes: tuple[str, ...], sizes: list[int] | None = None
) -> tuple[Part, ...]:
    """The files as they are, or a RowError for the first thing that makes them unreadable."""
    if not files:
        raise RowError(f"the {kind} holds no data file; known are {', '.join(suffixes)}")
    for index, file in enumerate(files):
        name = file.shown if len(files) > 1 else "the file"
        if not file.path.endswith(suffixes):
            what = next((advice for suffix, advice in FOREIGN.items() if file.path.endswith(suffix)), "")
            raise RowError(
                f"cannot read {what}" if what else f"cannot tell the kind of file; known are {', '.join(suffixes)}"
            )
        if sizes is None and not os.access(file.path, os.R_OK):
            raise RowError(f"no permission to read {name}")
        if (os.path.getsize(file.path) if sizes is None else sizes[index]) == 0:
            raise RowError(f"{name} is empty (0 bytes)")
    return tuple(files)


class _LocalFolder:
    """A folder as `saved_datasets` reads it."""

    def __init__(self, path: Path):
        self.path = path
        self.shown = str(path)

    def names(self, inside: str = "") -> list[str]:
        return os.listdir(self.path / inside)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class _RemoteFolder:
    """The same in a bucket."""

    def __init__(self, fs: Any, root: str):
        self.fs, self.root = fs, root
        self.shown = str(fs.unstrip_protocol(root))

    def names(self, inside: str = "") -> list[str]:
        listed = self.fs.ls(f"{self.root}/{inside}".rstrip("/"), detail=False)
        return [name.rpartition("/")[2] for name in listed]

    def read(self, name: str) -> bytes:
        return cast(bytes, self.fs.cat_file(f"{self.root}/{name}"))


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Numbered = Iterator[tuple[int, dict[str, Any] | RowError]]


def rows(part: Part) -> Iterator[Row]:
    """Streams the rows; memory does not grow with the file. A row that cannot be read has a RowError as its value.

    Where the rest of a file cannot be found again (a torn gzip stream, a broken array), that row is the last.
    Raises InputError if a hub data set cannot be loaded.
    """
    number = 0
    try:
        for number, value in _reader(part):
            yield Row(part, number, value)
    except UnreadableFile as error:
        yield Row(part, error.number or number + 1, error)
    except EOFError:
        yield Row(part, number + 1, UnreadableFile("the gzip stream ends here, too early; the file is truncated"))
    except (OSError, zlib.error) as error:
        yield Row(part, number + 1, UnreadableFile(f"cannot read on: {one_line(error)}"))


def _reader(part: Part) -> Numbered:
    if isinstance(part, HubSplit):
        return enumerate(_hub_dataset(part), start=1)
    if part.path.endswith(".parquet"):
        return _parquet(part.path)
    if part.path.endswith(TEXT_SUFFIXES):
        return _documents(part.path)
    if part.path.endswith(ARROW_SUFFIXES):
        return _arrow(part.path)
    if (suffix := os.path.splitext(part.path.removesuffix(".gz"))[1]) in SEPARATED:
        return _separated(part.path, SEPARATED[suffix])
    lines_only = part.path.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    return _json(part.path, lines_only)


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, fsspec.open(path, "rb").open() if "://" in path else open(path, "rb"))


def _arrow(path: str) -> Numbered:
    from training.data import tables

    with _open(path) as stream:
        yield from tables.arrow(stream)


def _separated(path: str, separator: str) -> Numbered:
    from training.data import tables

    with _open(path) as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        yield from tables.separated(stream, separator)


def _documents(path: str) -> Numbered:
    """The file as one document; one longer than DOCUMENT_BYTES as several."""
    with _open(path) as stream:
        number, lines = 0, stream.readlines(DOCUMENT_BYTES)
        while lines:
            number += 1
            text = b"".join(lines).removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
            try:
                yield number, {"text": text.decode("utf-8")}
            except UnicodeDecodeError as error:
                yield number, _not_utf8(error)
            lines = stream.readlines(DOCUMENT_BYTES)


def _json(path: str, lines_only: bool) -> Numbered:
    with _open(path) as raw:
        inner: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        stream = io.BufferedReader(inner, buffer_size=1 << 16)
        head = stream.peek().removeprefix(codecs.BOM_UTF8).lstrip()
        yield from _json_lines(stream) if lines_only or not head.startswith(b"[") else _json_array(stream)


def _json_lines(stream: io.BufferedReader) -> Numbered:
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, _parsed_line(line)


def _parsed_line(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _as_object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON: {error.msg} (column {error.colno}); a row is one object on one line")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested brackets
        return RowError(f"broken JSON: {error}")


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    return RowError(f"not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8")


def _as_object(value: Any) -> dict[str, Any] | RowError:
    return value if isinstance(value, dict) else RowError(f"expected an object of columns, got {describe(value)}")


def _json_array(stream: io.BufferedReader) -> Numbered:
    window = _Window(io.TextIOWrapper(stream, encoding="utf-8-sig").read)
    number = 0
    try:
        window.take("[")
        while window.peek() != "]":
            number += 1
            yield number, _as_object(window.value())
            if window.peek() != "]":
                window.take(",")
        window.take("]")
        if rest := window.peek():
            yield number + 1, UnreadableFile(f"nothing may follow the array's closing bracket, got {rest!r}")
    except UnicodeDecodeError as error:
        yield number + 1, UnreadableFile(str(_not_utf8(error)))
    except (ValueError, RecursionError) as error:
        yield max(number, 1), UnreadableFile(f"broken JSON: {error}; the rest of the array cannot be read")


class _Window:
    """A view that slides over the text of a JSON array, as wide as its longest row needs."""

    def __init__(self, read: Callable[[int], str]):
        self._read = read
        self._text = ""
        self._at = 0

    def _more(self) -> bool:
        """Forgets what was used and reads on; doubles with the text at hand, so that a long row costs linear time."""
        self._text = self._text[self._at :]
        self._at = 0
        chunk = self._read(max(ARRAY_CHUNK, len(self._text)))
        self._text += chunk
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        got = self.peek()
        if got != expected:
            raise ValueError(f"expected {expected!r}, got {got!r}" if got else "the file ends inside the array")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                unread = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - ERROR_MARGIN
                if not (unread and self._more()):
                    raise ValueError(error.msg) from None


_DECODER = json.JSONDecoder()


def _parquet(path: str) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    read = 0
    with _open(path) as stream:
        try:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=PARQUET_BATCH_ROWS):
                yield from enumerate(batch.to_pylist(), start=read + 1)
                read += len(batch)
        except pa.ArrowException as error:
            yield read + 1, UnreadableFile(f"broken Parquet: {one_line(error)}")


@functools.lru_cache(maxsize=8)
def _hub_dataset(split: HubSplit) -> Any:
    import datasets

    try:
        at = {"revision": split.revision} if split.revision is not None else {}
        return datasets.load_dataset(split.path, split.name, split=split.split, **at)
    except Exception as error:  # the hub's client has no common base: offline, unknown name, gated, wrong configuration
        message = (
            f"no such file or folder, and the Hugging Face hub did not give a data set of this name: {one_line(error)}"
        )
        raise InputError.of(split.shown, message) from error


def describe(value: Any) -> str:
    """What a JSON value is, for an error text: `a number (12)`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({value})"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def one_line(error: Exception) -> str:
    """The text of another library's error: a problem is one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ── Content ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def digest(part: Part, memo: Path) -> str:
    """Changes when the rows may have changed.

    A local file: SHA-256 of its bytes. So that large files are not read again, it is remembered in the folder `memo` by
    path, size and modification time: a file rewritten in place with all three kept is not noticed. A remote file: what
    its store tells of it (size, time, ETag). A hub data set: its fingerprint.
    """
    if isinstance(part, HubSplit):
        return fingerprint(_hub_dataset(part))
    if "://" in part.path:
        fs, name = fsspec.core.url_to_fs(part.path)
        return str(fs.ukey(name))
    return _remembered_sha256(Path(part.path), memo)


def _remembered_sha256(path: Path, memo: Path) -> str:
    stat = path.stat()
    key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    note = memo / key[:32]
    if note.exists() and len(known := note.read_text()) == 64:
        return known
    with path.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time() - stat.st_mtime > RACY_S:
        memo.mkdir(parents=True, exist_ok=True)
        note.write_text(content)
    return content
