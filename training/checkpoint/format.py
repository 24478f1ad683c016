"""One checkpoint: a folder of shards and a manifest written last. No manifest, no checkpoint.

A worker writes two shards, one of weights and one of the optimizer's state. A shard is a safetensors file of stretches
of parameters in fp32, `fp32/NAME@START`, or of their moments, `exp_avg/NAME@START`, [count] each. It does not say which
worker or ZeRO stage wrote it, so any number of workers at any stage can read what they need: a reader asks for elements
a..b of a parameter and gets them from wherever they are.

Every byte is under a checksum: the manifest has that of a shard's header, the header has those of the shard's blocks.
So a stretch can be checked without reading the rest of the file.

Knows files and tensors, never DeepSpeed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from training.errors import MusterError
from training.io.foreign_files import loads, made_sense_of
from training.io.paths import is_below
from training.metric_schema import with_current_names
from training.storage import StoragePath

MANIFEST = "manifest.json"
METRICS = "metrics.json"
"""Beside it: the evaluation of its step, which may be done after the checkpoint is committed."""
WEIGHTS = "fp32"
"""Kind of the tensors that are weights; the others are the optimizer's."""
OPTIMIZER = ".optimizer.safetensors"
"""End of the names of shards that hold the optimizer's state alone.
Older versions wrote it beside the weights, into the same shard."""
FORMAT = 3
BLOCK_BYTES = 4 << 20
_BLOCKS_AT_ONCE = 8
_LENGTH = 8
"""Bytes of a header's length, which stand before it."""
_METADATA, _BLOCK_SIZE, _CHECKSUMS = "__metadata__", "block_bytes", "xxh128"


class CheckpointError(MusterError):
    """A checkpoint cannot be read: what is wrong with it, one finding a line."""


class NewerFormat(CheckpointError):
    """A checkpoint is well, and of a version of Muster that this one does not understand."""


@dataclass(frozen=True)
class File:
    """One shard of a checkpoint."""

    name: str
    """Its path below the checkpoint's folder."""
    size: int
    """Bytes."""
    header: int
    """Bytes before the first tensor."""
    xxh128: str
    """Checksum of these."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, readable by people."""

    phase: str
    step: int
    samples: int
    """Position in the data: samples trained on."""
    optimizer_steps: dict[str, int]
    """How often each role that learns has updated its weights."""
    attempt: int
    world_size: int
    zero_stage: int
    dtype: str
    chats: bool
    """Whether the training data are conversations."""
    bos: str = "none"
    """The setting `data.bos`; manifests of versions without it were written by runs
    that learnt plain texts without BOS."""
    stop_tokens: list[int] | None = None
    """Of PPO: the tokens that end a response. None in manifests of versions that did not note them."""
    job_hash: str
    data_hash: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Evaluation at this step, if there was one. In the file only of older versions: it is
    in metrics.json beside it."""
    parameters: dict[str, list[int]]
    """Shape of every trained parameter."""
    weights_only: bool = False
    """Whether the optimizer's state was deleted later (`checkpoint.keep_weights`): a run cannot
    be resumed from here."""
    state: dict[str, Any] = field(default_factory=dict)
    """What the driver of the phase goes on from beside weights and moments."""
    files: list[File]
    versions: dict[str, str]
    created: str
    format: int = FORMAT

    @classmethod
    def read(cls, folder: StoragePath) -> Manifest:
        """Raises CheckpointError when it is missing or cut, NewerFormat when it is of a later Muster."""
        path = folder / MANIFEST
        try:
            with made_sense_of(lambda why: CheckpointError(f"{path}: not a readable manifest ({why})")):
                manifest = cls._parse(path)
            return replace(manifest, metrics=with_current_names(_evaluation(folder) or manifest.metrics))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no {MANIFEST}: the checkpoint was never finished") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

    @classmethod
    def _parse(cls, path: StoragePath) -> Manifest:
        raw = loads(path.read())
        if raw["format"] != FORMAT:
            age, error = ("a newer", NewerFormat) if raw["format"] > FORMAT else ("an older", CheckpointError)
            raise error(f"{path}: written by {age} Muster (format {raw['format']}); this one reads {FORMAT}")
        files = [File(**entry) for entry in raw["files"]]
        if strays := [file.name for file in files if not is_below(file.name)]:
            raise ValueError(f"{strays[0]!r} is no name of a shard")
        metrics = {name: float(value) for name, value in raw.get("metrics", {}).items()}
        manifest = cls(**{**raw, "files": files, "metrics": metrics})
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raises ValueError for sizes that are none: they would be taken for sizes of memory."""
        counts = (self.step, self.samples, self.attempt, self.world_size, self.zero_stage)
        sizes = (size for shape in self.parameters.values() for size in shape)
        if not all(_is_count(number) for number in (*counts, *sizes)):
            raise ValueError("a number is none")
        for file in self.files:
            if not (_is_count(file.size) and _is_count(file.header) and _LENGTH <= file.header <= file.size):
                raise ValueError(f"{file.name} has no such header")

    def dumped(self) -> bytes:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=1).encode()

    def without_optimizer(self) -> Manifest | None:
        """The same without the shards of the optimizer; None if there are none, as in checkpoints of older versions."""
        files = [file for file in self.files if not file.name.endswith(OPTIMIZER)]
        return replace(self, files=files, weights_only=True) if len(files) < len(self.files) else None

    def below(self, prefix: str) -> Manifest:
        """The same with its files in the folder `prefix`."""
        return replace(self, files=[replace(file, name=f"{prefix}/{file.name}") for file in self.files])


def _evaluation(folder: StoragePath) -> dict[str, float]:
    """What is noted beside a manifest; nothing if that was cut short or spoilt."""
    try:
        with made_sense_of(ValueError):
            return {name: float(value) for name, value in loads((folder / METRICS).read()).items()}
    except (FileNotFoundError, ValueError):
        return {}


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


# -- writing -----------------------------------------------------------------------------------------------------------


def write_shard(path: StoragePath, layout: Sequence[tuple[str, int]], data: np.ndarray) -> File:
    """Write fp32 `data` [n] as one safetensors file; `layout` says what it is, as (name, count) one after the other."""
    raw = data.view(np.uint8).data
    blocks = [raw[start : start + BLOCK_BYTES] for start in range(0, len(raw), BLOCK_BYTES)]
    header = _header(layout, [xxhash.xxh3_128_hexdigest(block) for block in blocks])
    path.write_blocks([header, *blocks])
    return File(path.name, len(header) + len(raw), len(header), xxhash.xxh3_128_hexdigest(header))


def _header(layout: Sequence[tuple[str, int]], checksums: Sequence[str]) -> bytes:
    header: dict[str, Any] = {_METADATA: {_BLOCK_SIZE: str(BLOCK_BYTES), _CHECKSUMS: " ".join(checksums)}}
    end = 0
    for name, count in layout:
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# -- reading -----------------------------------------------------------------------------------------------------------


def verify(folder: StoragePath, *, deep: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one finding each; empty if every byte is as it was written.

    Not `deep`: files and sizes alone, without reading the content. Raises NewerFormat.
    """
    try:
        manifest = Manifest.read(folder)
    except NewerFormat:
        raise
    except CheckpointError as error:
        return [str(error)]
    findings = missing(folder, manifest)
    return findings if findings or not deep else _wrong_content(folder, manifest)


def missing(folder: StoragePath, manifest: Manifest) -> list[str]:
    """Shards that are not there with their whole size, one finding each."""
    sizes: dict[str, int | None] = {}
    for prefix in {file.name.rpartition("/")[0] for file in manifest.files}:
        inside = (folder / prefix if prefix else folder).children()
        sizes |= {f"{prefix}/{name}" if prefix else name: size for name, size in inside.items()}
    found = ((file, sizes.get(file.name)) for file in manifest.files)
    return [f"{folder / file.name}: {_size_problem(file, size)}" for file, size in found if size != file.size]


def _size_problem(file: File, size: int | None) -> str:
    return "missing" if size is None else f"{size:,} bytes, {file.size:,} were written"


def _wrong_content(folder: StoragePath, manifest: Manifest) -> list[str]:
    findings = []
    for file in manifest.files:
        try:
            _Shard.open(folder, file).check()
        except CheckpointError as error:
            findings.append(str(error))
    return findings


def _read(folder: StoragePath, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    try:
        return folder.read_ranges(ranges)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: a file of {', '.join(sorted({r[0] for r in ranges}))} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{folder / ranges[0][0]}: cannot be read: {error.strerror}") from None


class _Shard:
    """One shard, read in blocks; no byte of it is given out before its block was checked."""

    def __init__(self, folder: StoragePath, file: File, header: bytes):
        """Raises CheckpointError if the header is not as it was written."""
        if xxhash.xxh3_128_hexdigest(header) != file.xxh128:
            raise CheckpointError(f"{folder / file.name}: the header has changed since it was written (checksum)")
        self.folder = folder
        self.file = file
        with made_sense_of(
            lambda why: CheckpointError(f"{folder / file.name}: its header does not make sense ({why})")
        ):
            self._parse(header)
        self._last: tuple[int, bytes] = (-1, b"")

    def _parse(self, header: bytes) -> None:
        self.tensors: dict[str, Any] = loads(header[_LENGTH:])
        metadata = self.tensors.pop(_METADATA)
        self._block_bytes = int(metadata[_BLOCK_SIZE])
        self._checksums = metadata[_CHECKSUMS].split()
        content = self.file.size - self.file.header
        if self._block_bytes <= 0 or len(self._checksums) != -(-content // self._block_bytes):
            raise ValueError("not a checksum for each block")

    @classmethod
    def open(cls, folder: StoragePath, file: File) -> _Shard:
        return cls(folder, file, *_read(folder, [(file.name, 0, file.header)]))

    def check(self) -> None:
        """Read all of it. Raises CheckpointError if a byte has changed."""
        for _ in self._blocks(0, len(self._checksums)):
            pass

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) [n] with bytes start..start+n-1 after the header."""
        stop, size = start + len(out), self._block_bytes
        for number, block in self._blocks(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, number * size + len(block))
            out[low - start : high - start] = np.frombuffer(block, np.uint8, high - low, low - number * size)

    def _blocks(self, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Blocks first..stop-1, checked. The last is remembered: the next stretch often begins in it."""
        if first == self._last[0]:
            yield self._last
            first += 1
        for begin in range(first, stop, _BLOCKS_AT_ONCE):
            numbers = range(begin, min(begin + _BLOCKS_AT_ONCE, stop))
            for number, block in zip(numbers, _read(self.folder, [self._range(i) for i in numbers]), strict=True):
                if xxhash.xxh3_128_hexdigest(block) != self._checksums[number]:
                    raise CheckpointError(
                        f"{self.folder / self.file.name}: the content has changed since it was written (checksum)"
                    )
                self._last = (number, block)
                yield self._last

    def _range(self, number: int) -> tuple[str, int, int]:
        start = self.file.header + number * self._block_bytes
        return self.file.name, start, min(start + self._block_bytes, self.file.size)


@dataclass(frozen=True)
class _Piece:
    """Where a stretch of a parameter lies."""

    start: int
    count: int
    shard: _Shard
    offset: int
    """Bytes from the end of the shard's header."""


class Reader:
    """Reads any stretch of any parameter of a checkpoint, whoever wrote it.
    Reads headers once, then only what is asked.

    `prefix`: of the role whose parameters are meant; names are given without it.
    """

    def __init__(self, folder: StoragePath, prefix: str = ""):
        """Raises CheckpointError if the manifest or a header is damaged, or a shard is not there in its whole size."""
        self.manifest = Manifest.read(folder)
        self.prefix = prefix
        self.parameters = {
            name.removeprefix(prefix): shape
            for name, shape in self.manifest.parameters.items()
            if name.startswith(prefix)
        }
        """Shape of every trained parameter of the role."""
        if findings := missing(folder, self.manifest):
            raise CheckpointError("\n".join(findings))
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        files = self.manifest.files
        headers = _read(folder, [(file.name, 0, file.header) for file in files])
        for file, header in zip(files, headers, strict=True):
            why = f"{folder / file.name}: its header does not make sense"
            with made_sense_of(lambda odd, why=why: CheckpointError(f"{why} ({odd})")):  # type: ignore[misc]  # has a default
                self._index(_Shard(folder, file, header))

    def _index(self, shard: _Shard) -> None:
        for key, entry in shard.tensors.items():
            kind, _, where = key.partition("/")
            name, _, start = where.rpartition("@")
            count, offset = entry["shape"][0], entry["data_offsets"][0]
            if not (
                _is_count(count) and _is_count(offset) and offset + 4 * count <= shard.file.size - shard.file.header
            ):
                raise ValueError(f"{key} lies outside of the file")
            self._pieces[kind, name].append(_Piece(int(start), count, shard, offset))

    def read(self, kind: str, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` (fp32, contiguous) [n] with elements start..start+n-1 of the flattened parameter.

        Raises CheckpointError if a byte of them has changed or the checkpoint does not hold all of them.
        """
        stop, found = start + len(out), 0
        for piece in self._pieces.get((kind, f"{self.prefix}{name}"), ()):
            low, high = max(start, piece.start), min(stop, piece.start + piece.count)
            if low < high:
                target = out[low - start : high - start].view(np.uint8)
                piece.shard.read(piece.offset + 4 * (low - piece.start), target)
                found += high - low
        if found != len(out):
            raise CheckpointError(f"{kind} of {name}: {found:,} of {len(out):,} elements are in the checkpoint")

    def whole(self, name: str) -> np.ndarray:
        """A parameter's fp32 weights, in its own shape."""
        shape = self.parameters[name]
        stored = sum(piece.count for piece in self._pieces.get(("fp32", f"{self.prefix}{name}"), ()))
        if (count := math.prod(shape)) > stored:
            raise CheckpointError(f"fp32 of {name}: {stored:,} of {count:,} elements are in the checkpoint")
        out = np.empty(count, dtype=np.float32)
        self.read("fp32", name, 0, out)
        return out.reshape(shape)
