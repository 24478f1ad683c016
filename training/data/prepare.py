"""From sources to a token store: reads, checks and tokenizes every row in one pass, and keeps the result by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import BadRows, Data
from training.data import files, templates
from training.data.files import Located, Row
from training.data.formats import BOS, Chat, Example, Pair, Parser, Prompt, PromptCompletion, Text
from training.data.row_errors import RowError, UnreadableFile
from training.errors import InputError, Problem
from training.model_folder import TOKENIZER_FILES

if TYPE_CHECKING:
    from training.data.render import Renderer, Sample
    from training.data.token_store import Meta, StoreWriter, TokenStore

VERSION = 3
"""Raise it when the same rows give other tokens than before, so that older stores are not used."""
WITHOUT_TURNS = {"text", "preference", "sharegpt_preference", "prompts"}
"""Formats that `data.turns` says nothing of: a pair is judged at its last answer, a prompt has none to learn."""
BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 22
SHOWN_PROBLEMS = 20
_LOG = logging.getLogger("muster.data")
TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_templates/*.jinja",
)


@dataclass
class Findings:
    """What a pass over the rows has met."""

    rows: int = 0
    bad: int = 0
    rows_by_part: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    """The first of the bad rows."""
    unreadable: list[Problem] = field(default_factory=list)
    """Files of which the rest cannot be read."""
    source_formats: list[Counter[str]] = field(default_factory=list)
    """Rows by format, of each source."""
    limit: BadRows | None = None
    """How many bad rows are left out. None: they are refused."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the rows."""

    def add_bad(self, row: Row, error: RowError) -> None:
        if isinstance(error, UnreadableFile):
            self.unreadable.append(Problem(row.where, "", str(error)))
            return
        self.bad += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append(Problem(row.where, "", str(error)))

    @property
    def formats(self) -> Counter[str]:
        """Rows by format."""
        return sum(self.source_formats, Counter())

    @property
    def refused(self) -> bool:
        """Whether it is sure already that the data are refused."""
        return bool(self.unreadable) or (self.limit is None and self.bad > 0)

    def raise_if_bad(self, sources: Sequence[Located]) -> None:
        """Raises InputError with the first bad rows, the number of the others, and the files without any row.

        Bad rows are let through if they are at most the fraction that `limit` says.
        """
        shown = [part.shown for source in sources for part in source.parts]
        problems = [Problem(name, "", "holds no rows") for name in shown if not self.rows_by_part[name]]
        if self.limit is None or self.bad > self.limit.drop * self.rows or self.unreadable:
            problems = self._bad_ones() + self.unreadable + problems
        if problems:
            raise InputError(problems)

    def _bad_ones(self) -> list[Problem]:
        rest, found = self.bad - len(self.problems), list(self.problems)
        if rest > 0:
            found.append(Problem("", "", f"and {rest:,} more bad rows (of {self.rows:,} rows)"))
        if self.limit is not None and self.bad > self.limit.drop * self.rows:
            share = f"{self.bad:,} of {self.rows:,} rows are bad ({self.bad / self.rows:.2%})"
            found.append(
                Problem("", "data.bad_rows", f"{share}, more than the {self.limit.drop:.2%} that may be dropped")
            )
        return found


Parsed = tuple[int, Row, Example]
"""Place of the source, the row, and what it says."""


def check_rows(sources: Sequence[Located], data: Data, formats: Sequence[str], base: Path = Path()) -> Findings:
    """Reads and parses every row, without a tokenizer and without keeping anything: memory does not grow with the data.

    Raises InputError with the settings that are wrong, else with the bad rows.
    """
    templates.load(data.template, base)
    parser = Parser(data.format, data.columns, formats)
    findings = _findings(sources, data)
    for _ in _parsed(sources, parser, findings):
        pass
    findings.raise_if_bad(sources)
    findings.notes = parser.remarks.notes
    return findings


def _findings(sources: Sequence[Located], data: Data) -> Findings:
    limit = data.bad_rows if isinstance(data.bad_rows, BadRows) else None
    return Findings(source_formats=[Counter() for _ in sources], limit=limit)


def prepare(
    sources: Sequence[Located],
    data: Data,
    formats: Sequence[str],
    tokenizer_path: str,
    cache: Path,
    *,
    base: Path = Path(),
    trust_remote_code: bool = False,
    revision: str | None = None,
    verify: bool = True,
) -> TokenStore:
    """The samples of `sources` as tokens, from the folder `cache` if they are there, else read, checked and kept there.

    `formats` are those the recipe reads; `revision` is of a tokenizer on the hub; `base` is where a template file is
    looked for. A store is found again by the content of files (see `files.digest`), tokenizer and template, and by the
    settings that make a difference. One that is not as it was written is made anew. `verify`: read all of it to find
    that out; False where another process has just done so. `store.meta` has the counts, and in `notes` what the user
    should be told; `store.damage` says why one was made anew. Raises InputError: the bad rows, a source of which no
    sample is left, data or a cache that cannot be read or written.
    """
    from training.data.render import Renderer, load_tokenizer
    from training.data.token_store import TokenStore

    parser = Parser(data.format, data.columns, formats)

    def renderer() -> Renderer:
        tokenizer = load_tokenizer(tokenizer_path, trust_remote_code, revision)
        return Renderer(tokenizer, data.template, base, turns=data.turns, bos=data.bos)

    try:
        words = tokenizer_content(tokenizer_path, trust_remote_code, revision)
        folder = cache / _key(sources, data, formats, words, base, memo=cache / "digests")
        damage: list[str] = []
        store = _existing(folder, data, verify, damage)
        if store is None:
            store = TokenStore.open(_build(folder, sources, data, parser, renderer()))
        store.damage = damage
        return store
    except OSError as error:
        raise InputError.of(
            str(cache), f"cannot read the data or write the token cache (MUSTER_CACHE names another folder): {error}"
        ) from error


def _existing(folder: Path, data: Data, verify: bool, damage: list[str]) -> TokenStore | None:
    """The store at `folder`, or at its place for rows that make use of CHANGES. What is wrong with one is added to
    `damage`."""
    for with_bos, changed in product((True, False) if data.bos == "auto" else (False,), (True, False)):
        store = _usable(_changed(folder, changed=changed, with_bos=with_bos), verify, damage)
        if store is not None and (with_bos or data.bos == "none" or store.meta.same_without_bos):
            return store
    return None


def _usable(folder: Path, verify: bool, damage: list[str]) -> TokenStore | None:
    """The store at `folder`. One that is damaged is removed, which a warning and `damage` say;
    one of a version without checksums is removed."""
    from training.data.token_store import TokenStore

    if not folder.exists():
        return None
    found = folder.stat()
    try:
        store = TokenStore.open(folder)
        if store.meta.checksums:
            if verify:
                store.verify()
            return store
    except (OSError, ValueError, TypeError) as error:
        _LOG.warning("the tokenized data in the cache are damaged and are made anew: %s", error)
        damage.append(str(error))
    _remove(folder, found)
    return None


def _remove(folder: Path, found: os.stat_result) -> None:
    """Remove a store, unless another process has put another one in its place since it was found.
    Raises OSError if it cannot be removed."""
    with suppress(FileNotFoundError):
        if os.path.samestat(folder.stat(), found):
            removed = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
            folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _changed(folder: Path, *, changed: bool, with_bos: bool) -> Path:
    """The place of a store whose rows make use of CHANGES: of BOS, or of others. That of all others stays as it was."""
    name = folder.name + " with changes" * changed + " with bos" * with_bos
    return folder.with_name(hashlib.sha256(name.encode()).hexdigest()[:32]) if changed or with_bos else folder


def tokenizer_content(path: str, trust_remote_code: bool = False, revision: str | None = None) -> str:
    """A hash of what the tokenizer does. Of a folder its files are read, which is quick;
    of a hub id what was loaded."""
    if os.path.isdir(path):
        found = {file for pattern in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS) for file in Path(path).glob(pattern)}
        content = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(found)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
    from training.data.render import load_tokenizer

    tokenizer = load_tokenizer(path, trust_remote_code, revision)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special])
    return hashlib.sha256(text.encode()).hexdigest()


def _key(sources: Sequence[Located], data: Data, formats: Sequence[str], words: str, base: Path, memo: Path) -> str:
    """Names a store by everything that its tokens depend on, and nothing else: equal
    on every machine, wherever files lie."""
    content = [[files.digest(part, memo) for part in source.parts] for source in sources]
    template = [data.template, templates.load(data.template, base)]
    settings: list[Any] = [data.format, data.columns, list(formats), data.max_length, data.overlong]
    if isinstance(data.bad_rows, BadRows):
        settings.append({"bad_rows": data.bad_rows.drop})
    settings += [data.turns] if data.turns != "auto" else []
    text = json.dumps([VERSION, content, words, template, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parsed(
    sources: Sequence[Located],
    parser: Parser,
    findings: Findings,
    add_bad: Callable[[Row, RowError], None] | None = None,
) -> Iterator[Parsed]:
    """Streams the good rows; the bad ones go to `add_bad`, else to the findings."""
    for place, source in enumerate(sources):
        for row in (row for part in source.parts for row in files.rows(part)):
            findings.rows += 1
            findings.rows_by_part[row.part.shown] += 1
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                format, example = parser(row.value, from_arrow=row.from_arrow)
            except RowError as error:
                (add_bad or findings.add_bad)(row, error)
            else:
                findings.source_formats[place][format] += 1
                if row.from_arrow and isinstance(example, Prompt):  # whose row is kept for the rewards
                    row = row._replace(value=dict(parser.remove_filled_nulls(row.value, format)))
                yield place, row, example


def _batches(stream: Iterator[Parsed]) -> Iterator[list[Parsed]]:
    """Enough rows at once for the tokenizer's threads, and not more characters than memory likes."""
    batch: list[Parsed] = []
    size = 0
    for parsed in stream:
        batch.append(parsed)
        size += _characters(parsed[2])
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(example: Example) -> int:
    match example:
        case Text(text):
            return len(text)
        case PromptCompletion(prompt, completion, system):
            return len(system) + len(prompt) + len(completion)
        case Chat(messages):
            return sum(len(message["content"]) for message in messages)
        case Pair(chosen, rejected):
            return _characters(chosen) + _characters(rejected)
        case Prompt(content):
            return len(content) if isinstance(content, str) else _characters(content)


def _build(folder: Path, sources: Sequence[Located], data: Data, parser: Parser, renderer: Renderer) -> Path:
    """Writes a store and returns its folder, which is another one for rows that make use of CHANGES."""
    from training.data.token_store import create

    findings = _findings(sources, data)
    with create(folder, len(sources)) as writer:

        def add_bad(row: Row, error: RowError) -> None:
            findings.add_bad(row, error)
            if not findings.refused:
                writer.add_bad(row.where, str(error))

        for batch in _batches(_parsed(sources, parser, findings, add_bad)):
            results = renderer.samples([example for _, _, example in batch])
            for (place, row, example), result in zip(batch, results, strict=True):
                if isinstance(result, RowError):
                    add_bad(row, result)
                elif not findings.refused:
                    for sample in result:
                        _keep(writer, sample, data, place, row, example)
        findings.raise_if_bad(sources)
        writer.meta.rows = findings.rows
        writer.meta.formats = dict(findings.formats)
        writer.meta.source_formats = [dict(counts) for counts in findings.source_formats]
        writer.meta.tokenizer_rows = renderer.tokenizer_rows
        writer.meta.chats = renderer.has_written_chats
        writer.meta.notes = files.without_effect(sources) + (
            parser.remarks.notes + renderer.notes + _turn_notes(writer.meta, data) + _notes(writer.meta, data)
        )
        _raise_if_nothing_left(sources, writer.meta, data)
        writer.meta.same_without_bos = not renderer.bos_matters
        changes, with_bos = parser.remarks.changes | renderer.changes, renderer.bos_matters and data.bos == "auto"
        writer.meta.changes = sorted(changes | ({BOS} if with_bos else set()))
        if writer.meta.changes:
            writer.meta.hash_before = folder.name
            writer.destination = _changed(folder, changed=bool(changes), with_bos=with_bos)
    return writer.destination


def _keep(writer: StoreWriter, sample: Sample, data: Data, place: int, row: Row, example: Example) -> None:
    """Writes what fits of the sample, or counts why nothing does."""
    from training.data.render import fitted, fitted_pair, sides_of

    meta, is_pair = writer.meta, isinstance(example, Pair)
    meta.sequences += 1
    meta.left_out_answers += sample.left_out
    length = max(map(len, sides_of(sample.ids, sample.targets))) if is_pair else len(sample.ids)
    meta.longest = max(meta.longest, length)
    meta.shortest = min(meta.shortest or length, length)
    pieces = fitted_pair(sample, data.max_length) if is_pair else fitted(sample, data.max_length, data.overlong)
    with_targets = [piece for piece in pieces if piece.targets.any()]
    if not pieces:
        meta.dropped_overlong += 1
    elif not with_targets:
        meta.dropped_without_target += 1
    else:
        meta.truncated += length > data.max_length and data.overlong == "truncate"
        meta.split += length > data.max_length and data.overlong == "split"
        kept = json.dumps(row.value, default=str).encode() if isinstance(example, Prompt) else b""
        for piece in with_targets:
            writer.add(piece.ids, piece.targets, place, row.part.shown, row.number, piece.margin, kept)


def bad_rows_note(bad: int, rows: int) -> str:
    return f"{bad:,} of {rows:,} rows cannot be used and {'was' if bad == 1 else 'were'} dropped (data.bad_rows)"


def _notes(meta: Meta, data: Data) -> list[str]:
    limit = f"{data.max_length:,} tokens"
    told = {
        f"are longer than {limit} and were dropped": meta.dropped_overlong,
        f"are longer than {limit} and were cut": meta.truncated,
        f"are longer than {limit} and were split": meta.split,
        f"have nothing to learn within {limit} and were dropped": meta.dropped_without_target,
    }
    notes = [bad_rows_note(meta.dropped_bad, meta.rows)] if meta.dropped_bad else []
    return notes + [f"{count:,} of {meta.sequences:,} samples {what}" for what, count in told.items() if count]


def _turn_notes(meta: Meta, data: Data) -> list[str]:
    """What became of the answers of conversations."""
    if data.turns != "auto" and not (meta.chats and meta.formats.keys() - WITHOUT_TURNS):
        return [f"data.turns: {data.turns} changes nothing: it is for conversations whose answers are learned"]
    used = meta.rows - meta.dropped_bad
    if data.turns == "all" and meta.sequences > used:
        return [
            (
                f"the chat template rewrites earlier answers: {used:,} rows became {meta.sequences:,} samples, so that "
                "each is learned as it was given"
            )
        ]
    if not meta.left_out_answers:
        return []
    if data.turns == "last":
        return [f"{meta.left_out_answers:,} earlier answers are not learned (data.turns: last)"]
    return [
        (
            f"the chat template rewrites earlier answers of a conversation: {meta.left_out_answers:,} are not learned; "
            "data.turns: all learns each as it was given"
        )
    ]


def _raise_if_nothing_left(sources: Sequence[Located], meta: Meta, data: Data) -> None:
    """Every source must have a sample left: without one there is nothing to mix in at its weight."""
    emptied = {
        source.source.path: formats
        for source, size, formats in zip(sources, meta.source_sizes, meta.source_formats, strict=True)
        if not size
    }
    if emptied:
        raise InputError([_nothing_left(path, meta, data, bool(formats)) for path, formats in emptied.items()])


def _nothing_left(path: str, meta: Meta, data: Data, had_rows: bool) -> Problem:
    reasons = "; ".join(_notes(meta, data))
    if not had_rows or not meta.longest:
        return Problem(path, "", f"no sample is left, all its rows cannot be used: {reasons}")
    lengths = f"samples have {meta.shortest:,} to {meta.longest:,} tokens, data.max_length is {data.max_length:,}"
    advice = f"set data.max_length to {meta.longest:,}" + (
        " or data.overlong to truncate" if data.overlong == "drop" else ""
    )
    return Problem(path, "", f"no sample is left: {reasons} ({lengths}); {advice}")
