"""Tokenized samples as a folder of flat memory-mapped arrays: O(1) memory to write, none to speak of to read.

    tokens.bin         uint32   the token ids of all samples, one after the other
    targets.bin        bool     for each of them, whether it is learnt
    offsets.bin        int64    where each sample starts; one more than there are samples
    target_counts.bin  int64    targets of each sample
    margins.bin        float32  margin of each sample that is a pair, else 0
    bad_rows.jsonl     rows that were left out (data.bad_rows), if there are any: where, and why
    parts.bin, numbers.bin      where each sample came from: place in `meta.parts`, and row in it
    rows.bin, row_ends.bin      of prompts the rows themselves, as JSON, one after the other, and where each ends
    meta.json          counts, notes, names, the checksums of all files and of itself; written last

Samples lie in the order in which they were read, so those of a source lie together. Knows no tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from training.io.owned_folders import OWNER, own, sweep

ARRAYS: dict[str, type[np.generic]] = {
    "tokens": np.uint32,
    "targets": np.bool_,
    "offsets": np.int64,
    "target_counts": np.int64,
    "margins": np.float32,
    "parts": np.int32,
    "numbers": np.int64,
    "row_ends": np.int64,
    "rows": np.uint8,
}


@dataclass
class Meta:
    """What there is to say about a store beside its samples."""

    rows: int = 0
    """Rows that were read."""
    kept: int = 0
    """Samples in the store."""
    dropped_overlong: int = 0
    truncated: int = 0
    """Samples that were cut to max_length; those that lost all targets count below instead."""
    split: int = 0
    """Rows that became several samples of at most max_length."""
    dropped_without_target: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    """Tokens of the longest sequence, before anything was dropped or cut."""
    shortest: int = 0
    """Tokens of the shortest, likewise."""
    formats: dict[str, int] = field(default_factory=dict)
    """Rows by format."""
    source_formats: list[dict[str, int]] = field(default_factory=list)
    """The same of each source, in the order of the job file. Empty in stores that were made before it was counted."""
    dropped_bad: int = 0
    """Rows that cannot be used and were left out."""
    chats: bool = False
    """Whether any of them were written with a chat template."""
    same_without_bos: bool = False
    """Whether the tokens are the same with `data.bos: none`."""
    sequences: int = 0
    """Samples that the rows gave before any was dropped or split: with `data.turns: all` a row may give several."""
    left_out_answers: int = 0
    """Answers of conversations that could be learned and are not, see `data.turns`."""
    changes: list[str] = field(default_factory=list)
    """Entries of `formats.CHANGES` that the rows make use of."""
    hash_before: str = ""
    """The name that the store would have without `changes`, if there are any."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""
    largest_id: int = -1
    """The largest token id; -1 in stores that were written before it was noted."""
    tokenizer_rows: int = 0
    """Rows that an embedding needs for every token of the tokenizer; 0 where it was not noted."""
    row_bytes: int = 0
    """Of the rows that are kept as they are."""
    parts: list[str] = field(default_factory=list)
    """Files and hub splits that were read, as a person writes them."""
    source_sizes: list[int] = field(default_factory=list)
    """Samples of each source, in the order of the job file."""
    checksums: dict[str, str] = field(default_factory=dict)
    """xxh3_128 of every other file, by its name. Empty in stores of versions that wrote none."""
    checksum: str = ""
    """Of meta.json itself: of all other entries."""


BAD_ROWS = "bad_rows.jsonl"
META = "meta.json"
_READ_BYTES = 1 << 18
"""At once, while a file is verified: it stays in the processor's cache."""
_READERS = 2


def _checksum_of_meta(entries: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in entries.items() if name != "checksum"}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _checksum_of_file(path: Path) -> str:
    # Read, not mapped: mapped pages would count as memory of this process.
    checksum, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.hexdigest()


class TokenStore:
    """A store opened for reading. Safe to open in many processes and to pickle."""

    def __init__(self, folder: Path):
        """Raises FileNotFoundError if there is no store, ValueError
        if a file of it has been cut short, or meta.json changed."""
        self.folder = folder
        self.damage: list[str] = []
        """What was wrong with the store in the place of which this one has just been made. `prepare` sets it."""
        entries = json.loads((folder / META).read_text(encoding="utf-8"))
        self.meta = Meta(**entries)
        if self.meta.checksum and self.meta.checksum != _checksum_of_meta(entries):
            raise ValueError(f"{folder / META}: the content has changed since it was written (checksum)")
        self._arrays = {name: self._map(name) for name in ARRAYS}
        self.offsets: NDArray[np.int64] = self._arrays["offsets"]
        self.target_counts: NDArray[np.int64] = self._arrays["target_counts"]
        self.margins: NDArray[np.float32] = self._arrays["margins"]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        return cls(folder)

    def verify(self) -> None:
        """Reads every file. Raises ValueError unless all of them are as they were written,
        OSError if one cannot be read."""

        def verify(name: str) -> None:
            if _checksum_of_file(self.folder / name) != self.meta.checksums[name]:
                raise ValueError(f"{self.folder / name}: the content has changed since it was written (checksum)")

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(verify, self.meta.checksums))

    def _map(self, name: str) -> NDArray[Any]:
        meta, path, dtype = self.meta, self.folder / f"{name}.bin", ARRAYS[name]
        counts = {"tokens": meta.tokens, "targets": meta.tokens, "offsets": meta.kept + 1, "rows": meta.row_bytes}
        count = counts.get(name, meta.kept)
        if path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise ValueError(f"{path}: expected {count} values, got {path.stat().st_size} bytes; delete the folder")
        # A view as a plain array: slicing a memmap itself costs several times as much.
        return np.asarray(np.memmap(path, dtype, mode="r")) if count else np.empty(0, dtype)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return self.meta.kept

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids [T] and targets [T] of a sample, as arrays of their own. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        here = slice(self.offsets[index], self.offsets[index + 1])
        return self._arrays["tokens"][here].astype(np.int64), np.array(self._arrays["targets"][here])

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[samples] tokens of each."""
        return np.diff(self.offsets)

    def lengths_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these samples, without looking at the others. [n] -> [n]"""
        return self.offsets[samples + 1] - self.offsets[samples]

    def ids_from(self, first: int) -> list[int]:
        """Token ids of at least `first` that occur, sorted."""
        if not self.meta.tokens or -1 < self.meta.largest_id < first:
            return []
        tokens = self._arrays["tokens"]
        ids: list[int] = np.unique(tokens[tokens >= first]).tolist()
        return ids

    @property
    def source_sizes(self) -> list[int]:
        """Samples of each source; they lie one source after the other."""
        return self.meta.source_sizes

    def bad_rows(self, limit: int | None = None) -> list[dict[str, str]]:
        """The rows that were left out, the first `limit` of them: `row` and `reason`."""
        if not self.meta.dropped_bad:
            return []
        with (self.folder / BAD_ROWS).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, limit)]

    def where(self, index: int) -> str:
        """The row that a sample was: `data/sft.jsonl:42`."""
        return f"{self.meta.parts[self._arrays['parts'][index]]}:{self._arrays['numbers'][index]}"

    def row(self, index: int) -> dict[str, Any]:
        """The row of a prompt, as it was read."""
        ends = self._arrays["row_ends"]
        here = slice(ends[index - 1] if index else 0, ends[index])
        row: dict[str, Any] = json.loads(self._arrays["rows"][here].tobytes())
        return row


class _File:
    """A file that is written, and the checksum of what was written to it."""

    def __init__(self, file: BinaryIO, checksum: xxhash.xxh3_128):
        self._file, self._checksum = file, checksum

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum.update(data)


class StoreWriter:
    """Appends samples; made by `create`."""

    def __init__(self, folder: Path, sources: int, files: ExitStack):
        self.meta = Meta(source_sizes=[0] * sources)
        self.destination: Path
        """Where the store stands in the end."""
        self._folder = folder
        self._part_places: dict[str, int] = {}
        self._checksums: dict[str, xxhash.xxh3_128] = {}
        self._open = files
        self._files = {name: self._opened(f"{name}.bin") for name in ARRAYS}
        self._bad_rows: _File | None = None
        self._append("offsets", 0)

    def _opened(self, name: str) -> _File:
        file = self._open.enter_context((self._folder / name).open("wb"))
        checksum = self._checksums[name] = xxhash.xxh3_128()
        return _File(file, checksum)

    def _append(self, name: str, values: float | Sequence[int] | NDArray[Any]) -> None:
        self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())

    def add(
        self,
        ids: NDArray[Any],
        targets: NDArray[np.bool_],
        source: int,
        part: str,
        number: int,
        margin: float = 0.0,
        row: bytes = b"",
    ) -> None:
        """One sample, row `number` of `part`, from the source at place `source`. Sources must come in order."""
        num_targets = int(targets.sum())
        self.meta.kept += 1
        self.meta.tokens += len(ids)
        self.meta.largest_id = max(self.meta.largest_id, int(ids.max()) if len(ids) else -1)
        self.meta.target_tokens += num_targets
        self.meta.source_sizes[source] += 1
        self._append("tokens", ids)
        self._append("targets", targets)
        self._append("offsets", self.meta.tokens)
        self._append("target_counts", num_targets)
        self._append("margins", margin)
        self._append("parts", self._part_places.setdefault(part, len(self._part_places)))
        self._append("numbers", number)
        self.meta.row_bytes += len(row)
        self._append("row_ends", self.meta.row_bytes)
        self._append("rows", np.frombuffer(row, np.uint8))

    def add_bad(self, row: str, reason: str) -> None:
        """A row that is left out."""
        self.meta.dropped_bad += 1
        if self._bad_rows is None:
            self._bad_rows = self._opened(BAD_ROWS)
        self._bad_rows.write((json.dumps({"row": row, "reason": reason}, ensure_ascii=False) + "\n").encode())

    def finish(self) -> None:
        self.meta.parts = list(self._part_places)
        self.meta.checksums = {name: checksum.hexdigest() for name, checksum in self._checksums.items()}
        entries = asdict(self.meta)
        entries["checksum"] = _checksum_of_meta(entries)
        (self._folder / META).write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def create(folder: Path, sources: int) -> Iterator[StoreWriter]:
    """A writer whose store stands at `folder`, or at the `destination` that it is given, when the block ends without an
    error; else nothing is left.

    Two processes may create the same store at once: each writes beside,
    the first rename wins, and the stores are equal.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_unfinished(folder.parent)
    building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    building.mkdir()
    owner = own(building)
    try:
        with ExitStack() as files:
            writer = StoreWriter(building, sources, files)
            writer.destination = folder
            yield writer
        writer.finish()
        (building / OWNER).unlink()
        _move(building, writer.destination)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(owner)


def sweep_unfinished(cache: Path) -> None:
    """Remove what processes that were killed have left of stores."""
    sweep(cache, ".*-*")


def _move(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise
