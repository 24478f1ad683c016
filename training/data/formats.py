"""From a row to an example: recognises a row's format by its columns and parses it. Knows no file and no tokenizer.

A format is one entry of the table FORMATS: the columns it needs, those it may have, and a function from a record to an
example. Whatever a row is called outside, an example is one of five things: text, a prompt with its completion, a chat,
a pair of these of which one is preferred, or a prompt alone.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from training.data.files import describe
from training.data.final_answers import as_verdict, verdict
from training.data.row_errors import RowError
from training.data.unread import unread_columns, unread_keys
from training.errors import InputError, Problem

Message = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A document; all of it is learnt."""

    text: str


@dataclass(frozen=True)
class PromptCompletion:
    """Two texts that follow each other as they stand; the second is learnt."""

    prompt: str
    completion: str
    system: str = ""
    """A system message. Only conversations have a place for it: it is read where the texts become one."""


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates read (OpenAI's, tool arguments as objects)."""

    messages: list[Message]
    loss_turns: tuple[int, ...]
    """Indices of the assistant turns that count in the loss, ascending."""
    tools: list[dict[str, Any]] | None = None
    """Functions that may be called, as JSON schemas."""


Answer = Text | PromptCompletion | Chat


@dataclass(frozen=True)
class Pair:
    """Two answers to the same prompt, whole with their prompts."""

    chosen: Answer
    rejected: Answer
    margin: float = 0.0
    """By how much the reward of the chosen one should be higher at least."""


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: a text as it stands, or a conversation whose next turn is the assistant's."""

    content: str | Chat
    system: str = ""
    """Of a text, as of `PromptCompletion`."""


Example = Answer | Pair | Prompt


@dataclass
class Remarks:
    """What rows have shown beside their examples."""

    notes: list[str] = field(default_factory=list)
    """Sentences for the user, each once."""
    changes: set[str] = field(default_factory=set)
    """Entries of CHANGES that the rows make use of."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


BOS, EOS = "bos", "eos"
CHANGES = {
    BOS: "what the tokenizer puts before plain texts (BOS) is learnt, unless data.bos is none",
    EOS: "an EOS that a text ends with already is not doubled",
    "flags": "`train` and `loss` in messages are read",
    "system": "the column `system` is read, and a system message that stands there already is not repeated",
    "history": "the column `history` is read",
    "instruction": "an empty instruction is left out of the question, where there is an input",
    "function_call": "`function_call` of a message is read as a tool call",
    "json_messages": "prompts and answers that hold messages as JSON text are read as messages",
    "instruction_of_pairs": "`instruction`, `input` and `history` beside chosen and rejected are the question",
    "repeated_prompt": "a prompt that an answer repeats is written once",
    "nested_nulls": "nulls that Parquet fills in are removed at every depth",
    "nulls": "nulls in tool schemas and in the arguments of tool calls are kept",
    "arguments": "arguments of tool calls are written as text where the template expects text",
    "marks": "marks of the template are read as well where not all answers of a conversation are learned",
    "rewritten": "answers that the template rewrites are not learned in their rewritten form",
}
"""What rows mean since commit 3f9f597 that they did not mean before: only data sets
that make use of it have other tokens than they had."""


@dataclass(frozen=True)
class Record:
    """A row seen through the format's names; errors speak in the data's own."""

    row: Mapping[str, Any]
    names: Mapping[str, str]
    """The format's name -> the data's, where they differ."""
    remarks: Remarks = field(default_factory=Remarks)

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def has(self, column: str) -> bool:
        return self.name(column) in self.row

    def get(self, column: str) -> Any:
        """The value of an optional column: None if it is absent or null."""
        return self.row.get(self.names.get(column, column))

    def need(self, column: str) -> Any:
        value = self.get(column)
        if value is not None:
            return value
        if self.has(column):
            raise RowError(f"column `{self.name(column)}` is null")
        raise RowError(f"missing column `{self.name(column)}`; the row has {_listed(self.row)}")

    def text(self, column: str) -> str:
        return _text(self.need(column), f"column `{self.name(column)}`")

    def filled_text(self, column: str) -> str:
        """A text that is more than white space: an answer."""
        text = self.text(column)
        if not text.strip():
            raise RowError(f"column `{self.name(column)}` is empty")
        return text

    def system(self) -> str:
        """The system message of a row of texts; "" if there is none."""
        value = self.get("system")
        return value if isinstance(value, str) else ""

    def list(self, column: str) -> list[Any]:
        """A list, also as JSON in a text: tables have no other way to hold one."""
        place, value = f"column `{self.name(column)}`", self.need(column)
        is_json = isinstance(value, str) and value.lstrip().startswith("[")
        return _list(_decoded(value, place) if is_json else value, place)


@dataclass(frozen=True)
class Format:
    """A kind of row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Record], Example]
    """Raises RowError."""


class Parser:
    """Parses rows of the allowed formats.

    `format` is one of FORMATS or `auto`, which recognises each row by its columns; `columns` maps a format's names to
    the data's; `allowed` are the formats that the recipe reads, the likeliest first. Raises InputError for a format
    that the recipe does not read and for unknown names in `columns`.
    """

    def __init__(self, format: str, columns: Mapping[str, str], allowed: Sequence[str]):
        self._candidates = tuple(allowed) if format == "auto" else (format,)
        self._columns = columns
        self._names_of = {key: {name: columns.get(name, name) for name in _names(FORMATS[key])} for key in FORMATS}
        self._auto = format == "auto"
        self.remarks = Remarks()
        problems = [] if self._auto or format in allowed else [_foreign_format(format, allowed)]
        known = [name for key in self._candidates for name in _names(FORMATS[key])]
        problems += [_unknown_column(name, known) for name in columns if name not in known]
        if problems:
            raise InputError(problems)

    def __call__(self, row: Mapping[str, Any], *, from_arrow: bool = False) -> tuple[str, Example]:
        """The name of the row's format and the example. Raises RowError.

        `from_arrow`: the row comes from Parquet or Arrow, where a key that one object lacks and another has is null.
        """
        record = Record(row, self._columns, self.remarks)
        key = self._recognise(record) if self._auto else self._candidates[0]
        columns = self._names_of[key]
        record = replace(record, row=_with_messages(row, columns, self.remarks))
        if from_arrow:
            record = replace(record, row=_without_filled_nulls(record.row, columns.values(), self.remarks))
        example = FORMATS[key].parse(record)
        if key != "prompts":  # whose other columns go to reward functions
            for note in unread_columns(row, key, columns):
                self.remarks.note(note)
        return key, example

    def remove_filled_nulls(self, row: Mapping[str, Any], format: str) -> Mapping[str, Any]:
        """A row of Parquet or Arrow as it was meant: no nulls in the objects of the columns that a format reads."""
        return _without_filled_nulls(row, self._names_of[format].values(), self.remarks)

    def _recognise(self, record: Record) -> str:
        for present in (lambda name: record.get(name) is not None, record.has):
            for key in self._candidates:
                if all(map(present, FORMATS[key].required)):
                    return key
        raise _unrecognised(record, self._candidates)


# ── Errors that teach ────────────────────────────────────────────────────────────────────────────────────────────────

OTHER_NAMES = {
    "text": ("content", "document", "body"),
    "prompt": ("question", "query", "problem", "instruction", "input", "messages"),
    "completion": ("answer", "response", "output", "solution"),
    "instruction": ("prompt", "question", "query"),
    "output": ("response", "answer", "completion"),
    "question": ("prompt", "problem", "query", "instruction"),
    "answer": ("solution", "response", "output", "completion"),
    "critique": ("feedback", "review", "output"),
    "chosen": ("preferred", "accepted", "better", "response_chosen"),
    "rejected": ("dispreferred", "worse", "response_rejected"),
    "messages": ("conversation", "chat", "dialog", "dialogue"),
}
"""What data sets call the columns of the formats, for the advice in errors."""


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(str, names)) or "no columns"


def _names(format: Format) -> tuple[str, ...]:
    return format.required + format.optional


def _foreign_format(format: str, allowed: Sequence[str]) -> Problem:
    return Problem("", "data.format", f"this recipe does not read `{format}`; it reads {_listed(allowed)}")


def _unknown_column(name: str, known: Sequence[str]) -> Problem:
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]}?" if close else f"known are {_listed(dict.fromkeys(known))}"
    message = f"`{name}` is no column of a format; {advice} (the format's name comes first, then the data's)"
    return Problem("", "data.columns", message)


def _unrecognised(record: Record, candidates: Sequence[str]) -> RowError:
    for column, name in record.names.items():
        if name not in record.row:
            close = difflib.get_close_matches(name, list(record.row), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return RowError(
                f"missing column `{name}` (data.columns: {column}); the row has {_listed(record.row)}{hint}"
            )
    for key, format in FORMATS.items():
        # A prompt alone is a part of other formats: that something is missing beside it tells more.
        if key not in (*candidates, "prompts") and all(map(record.has, format.required)):
            return RowError(
                f"these are columns of `{key}`, {_reader(key)}; this recipe reads rows where {_needs(candidates)}"
                f"{_mapping_advice(record, candidates)}"
            )
    near = _nearest(record, candidates)
    if near is None:
        start, near_ones = f"no format fits the columns {_listed(record.row)}", candidates
    else:
        missing = next(name for name in FORMATS[near].required if not record.has(name))
        start, near_ones = f"missing column `{missing}`; the row has {_listed(record.row)}", [near]
    return RowError(f"{start}; {_needs(near_ones)}{_mapping_advice(record, near_ones)}")


def _reader(key: str) -> str:
    from training.recipes import RECIPES

    readers = [name for name, recipe in RECIPES.items() if key in recipe.formats]
    return f"which is for {_listed(readers)}" if readers else "which no recipe reads"


def _needs(candidates: Sequence[str]) -> str:
    return "; ".join(f"{key} needs {' and '.join(FORMATS[key].required)}" for key in candidates)


def _nearest(record: Record, candidates: Sequence[str]) -> str | None:
    """The first format of which the row has a part."""
    return next((key for key in candidates if any(map(record.has, FORMATS[key].required))), None)


def _mapping_advice(record: Record, candidates: Sequence[str]) -> str:
    for key in candidates:
        guesses = {name: _guess(name, record) for name in FORMATS[key].required}
        if all(guesses.values()) and len(set(guesses.values())) == len(guesses):
            pairs = ", ".join(f"{name}: {guess}" for name, guess in guesses.items() if name != guess)
            return f". Did you mean `columns: {{{pairs}}}`?"
    return ""


def _guess(name: str, record: Record) -> str | None:
    usual = next((other for other in (name, *OTHER_NAMES.get(name, ())) if other in record.row), None)
    return usual or next(iter(difflib.get_close_matches(name, list(record.row), n=1)), None)


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{place}: expected text, got {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{place}: half of a surrogate pair ({value[error.start]!r}) is not text") from None
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{place}: expected a list, got {describe(value)}")
    return value


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{place}: expected an object, got {describe(value)}")
    return value


def _object(value: Any, place: str) -> dict[str, Any]:
    """The object without keys that are null: a null and an absent key mean the same there."""
    return {key: item for key, item in _mapping(value, place).items() if item is not None}


def _without_filled_nulls(row: Mapping[str, Any], columns: Iterable[str], remarks: Remarks) -> Mapping[str, Any]:
    """The row with no null in the objects of these columns, at any depth: Arrow gives all objects
    of a column the same keys."""
    nested = {name: row[name] for name in columns if isinstance(row.get(name), list | dict)}
    return {**row, **{name: _without_nulls(value, remarks, name) for name, value in nested.items()}} if nested else row


def _with_messages(row: Mapping[str, Any], columns: Mapping[str, str], remarks: Remarks) -> Mapping[str, Any]:
    """The row with lists of messages also where they are JSON text, or an object of lists,
    which the feature `Sequence` of `datasets` makes."""
    read = {name: _transpose(row[name]) for name in columns.values() if isinstance(row.get(name), dict)}
    for name in (columns[each] for each in ("prompt", "completion", "chosen", "rejected") if each in columns):
        messages = _messages_in(row.get(name))
        if messages is not None:
            read[name] = messages
            remarks.changes.add("json_messages")
    return {**row, **read} if read else row


def _messages_in(text: Any) -> list[Any] | None:
    """The messages that a text is, as JSON."""
    if not isinstance(text, str) or not text.lstrip().startswith("[") or '"role"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)
    return value if is_list and value else None


def _transpose(value: dict[str, Any]) -> Any:
    roles = value.get("role", value.get("from"))
    lists = [each for each in value.values() if isinstance(each, list)]
    if not isinstance(roles, list) or len(lists) != len(value) or any(len(each) != len(roles) for each in lists):
        return value
    return [dict(zip(value, of_one, strict=True)) for of_one in zip(*lists, strict=True)]


_OUTER = ("tool_calls", "function", "arguments", "content")
"""Keys of messages and tools whose values had their nulls removed before this was done at every depth."""


def _without_nulls(value: Any, remarks: Remarks, key: str, is_deep: bool = False) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item, remarks, key, is_deep) for item in value]
    if not isinstance(value, dict):
        return value
    if is_deep and None in value.values():
        remarks.changes.add("nested_nulls")
    deeper = is_deep or key == "arguments"
    return {
        name: _without_nulls(item, remarks, name, deeper or name not in _OUTER)
        for name, item in value.items()
        if item is not None
    }


def _key(item: Mapping[str, Any], key: str, place: str, hint: str = "") -> Any:
    if key not in item:
        raise RowError(f"{place}: missing key `{key}`; it has {_listed(item)}{hint}")
    return item[key]


def _decoded(value: Any, place: str) -> Any:
    """JSON that may have been written into a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{place}: broken JSON in the text: {error}") from None


def _tools(record: Record) -> list[dict[str, Any]] | None:
    place = f"column `{record.name('tools')}`"
    tools = _decoded(record.get("tools") or [], place) or []
    listed = [_tool(tool, f"{place}[{index}]", record.remarks) for index, tool in enumerate(_list(tools, place))]
    return listed or None


def _tool(tool: Any, place: str, remarks: Remarks) -> dict[str, Any]:
    tool = _object(_decoded(tool, place), place)
    function = tool if "function" not in tool else _mapping(tool["function"], f"{place}.function")
    if None in function.values():
        remarks.changes.add("nulls")
    _text(_key(function, "name", place), f"{place}.name")
    return {"type": "function", "function": function}


class Arguments(dict[str, Any]):
    """Arguments of a tool call as an object, which most chat templates expect; `text` is for those that expect text."""

    own_text: str | None = None
    """What the row has, if that is text."""

    @property
    def text(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self.own_text is None else self.own_text


def _call(call: Any, place: str, remarks: Remarks) -> dict[str, Any]:
    """A tool call with its arguments as an object, or as the text that they are if that is no JSON object."""
    call = _object(call, place)
    function = call if "function" not in call else _object(call["function"], f"{place}.function")
    name = _text(_key(function, "name", place), f"{place}.name")
    arguments = _arguments(function.get("arguments") or {}, f"{place}.arguments", remarks)
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(given: Any, place: str, remarks: Remarks) -> Arguments | str:
    decoded = given
    if isinstance(given, str):
        try:
            decoded = json.loads(given)
        except (ValueError, RecursionError):
            decoded = None
        if not isinstance(decoded, dict):
            remarks.note("arguments of some tool calls are no JSON objects; they are written as the text that they are")
            return _text(given, place)
    arguments = Arguments(_mapping(decoded, place))
    arguments.own_text = given if isinstance(given, str) else None
    if None in arguments.values():
        remarks.changes.add("nulls")
    return arguments


# ── Formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_text(record: Record) -> Example:
    return Text(record.filled_text("text"))


def _parse_prompt_completion(record: Record) -> Example:
    """Two texts, or two lists of messages, of which one may be a text: the question or the answer alone."""
    prompt, completion = record.need("prompt"), record.need("completion")
    if not any(isinstance(each, list | dict) for each in (prompt, completion)):
        return _text_completion(record)
    before = _messages(_to_messages(prompt, "user"), record.name("prompt"), record.remarks)
    after = _messages(_to_messages(completion, "assistant"), record.name("completion"), record.remarks)
    whole = _joined(before, after)
    if whole.repeats:
        _note_repeated(record)
    messages = _with_system(whole.messages, record)
    first = whole.start + len(messages) - len(whole.messages)
    return _chat(messages, _tools(record), record.remarks, first=first)


def _to_messages(given: Any, role: str) -> list[Any]:
    """A message alone, or a text that is what `role` says, as a list of messages."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    return given if isinstance(given, list) else [given]


def _text_completion(record: Record) -> PromptCompletion:
    prompt, completion = record.text("prompt"), record.filled_text("completion")
    if _after_prompt(prompt, completion):
        names = f"`{record.name('completion')}` begins with the text of `{record.name('prompt')}`"
        record.remarks.note(f"column {names} in some rows, which stands there twice; take it out if it is not meant")
    _note_unread_tools(record)
    return PromptCompletion(prompt, completion, record.system())


def _note_unread_tools(record: Record) -> None:
    if record.get("tools"):
        name = f"column `{record.name('tools')}`"
        record.remarks.note(f"{name} is not read beside plain texts; give the rows as messages")


def _parse_alpaca(record: Record) -> Example:
    """The answers of `history` are learned as well, as in LLaMA-Factory (data/README.md) and ms-swift."""
    turns = [*_alpaca_question(record), {"role": "assistant", "content": record.filled_text("output")}]
    return _chat(_with_system(turns, record), None, record.remarks)


def _alpaca_question(record: Record) -> list[Message]:
    """The turns of `history`, and the question that `instruction` and `input` are together."""
    question = record.text("instruction")
    if record.get("input") is not None and (extra := record.text("input")):
        if not question:
            record.remarks.changes.add("instruction")
        question = f"{question}\n{extra}" if question else extra
    roles = ("user", "assistant")
    said = [*_history(record), question]
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]


def _history(record: Record) -> list[str]:
    """Question, answer, question, answer, ..."""
    name = f"column `{record.name('history')}`"
    texts: list[str] = []
    for index, pair in enumerate(record.list("history") if record.get("history") else []):
        place = f"{name}[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            got = f"{len(pair)} of them" if isinstance(pair, list) else describe(pair)
            raise RowError(f"{place}: expected a question and its answer, [text, text], got {got}")
        texts += [_text(text, place) for text in pair]
        if not texts[-1].strip():
            raise RowError(f"{place}: the answer is empty")
    if texts:
        record.remarks.changes.add("history")
    return texts


def _with_system(messages: list[Message], record: Record) -> list[Message]:
    """The messages behind the text of the column `system`, unless they begin with it.
    Raises RowError if they begin with another."""
    if record.get("system") is None or not (system := record.text("system")):
        return messages
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        record.remarks.changes.add("system")
        return [{"role": "system", "content": system}, *messages]
    if first["content"].strip() != system.strip():
        name = record.name("system")
        raise RowError(f"column `{name}` and the first message are two different system messages; give one of them")
    record.remarks.changes.add("system")
    return messages


def _parse_messages(record: Record) -> Example:
    messages = _messages(record.list("messages"), record.name("messages"), record.remarks)
    return _chat(_with_system(messages, record), _tools(record), record.remarks)


def _chat(messages: list[Message], tools: list[dict[str, Any]] | None, remarks: Remarks, first: int = 0) -> Chat:
    """The assistant turns from `first` on are learnt, unless they have weight 0 or open the conversation unasked."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if turns[:1] == [0] and "weight" not in messages[0]:
        remarks.note("assistant messages that open a conversation are not learned: nothing asks for them")
    if any(messages[place].get("weight") == 1 for place in turns if place < max(first, 1)):
        remarks.note(
            "assistant messages that open a conversation or belong to the prompt are not learned, whatever their weight"
        )
    loss_turns = tuple(place for place in turns if place >= max(first, 1) and messages[place].get("weight") != 0)
    if not loss_turns:
        reason = "all open the conversation, belong to the prompt or have weight 0" if turns else "there is none"
        raise RowError(f"no assistant turn to learn: {reason}")
    return Chat(_bare(messages), loss_turns, tools)


def _bare(messages: list[Message]) -> list[Message]:
    """The messages as chat templates see them."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
OTHER_ROLES = ("tool_call", "tool_response")
"""Roles of ms-swift: of a turn of the assistant that calls tools, and of what they answer."""


def _messages(messages: list[Any], name: str, remarks: Remarks) -> list[Message]:
    return [_message(message, f"{name}[{place}]", remarks) for place, message in enumerate(messages)]


def _message(message: Any, place: str, remarks: Remarks) -> Message:
    message = _object(message, place)
    role = _key(message, "role", place)
    if role in OTHER_ROLES:
        return _turn({**message, "from": role, "value": _content(message.get("content"), place)}, place, remarks)
    if role not in ROLES:
        raise RowError(f"{place}: unknown role {role!r}; known are {_listed(ROLES + OTHER_ROLES)}")
    weight = _weight(message, role, place, remarks)
    calls = _calls(message, place, remarks)
    content = _content(message.get("content", "" if calls else None), place)
    if role == "assistant" and not calls and not content.strip():
        raise RowError(f"assistant turn is empty ({place})")
    return {**message, "content": content, **({"tool_calls": calls} if calls else {}), **weight}


def _calls(message: Message, place: str, remarks: Remarks) -> list[dict[str, Any]]:
    """The tool calls of a message, also in the form that OpenAI had first: one `function_call`.
    Takes the keys out of the message."""
    given = _list(message.pop("tool_calls", []), f"{place}.tool_calls")
    calls = [_call(call, f"{place}.tool_calls[{index}]", remarks) for index, call in enumerate(given)]
    first_form = message.pop("function_call", None)
    if first_form is None or calls:
        return calls
    remarks.changes.add("function_call")
    return [_call(first_form, f"{place}.function_call", remarks)]


FLAGS = ("weight", "train", "loss")
"""Keys of a message that say whether it is learned: OpenAI's, axolotl's, ms-swift's."""


def _weight(message: Message, role: str, place: str, remarks: Remarks) -> dict[str, int]:
    """`{"weight": 0 or 1}` if the message says whether it is learned, else nothing.
    Takes the keys out of the message."""
    for note in unread_keys(message, place):
        remarks.note(note)
    given = {key: _switch(message.pop(key), key, place) for key in FLAGS if key in message}
    if len(set(given.values())) > 1:
        raise RowError(f"{place}: {' and '.join(f'`{key}`' for key in given)} contradict each other")
    if 0 in given.values() and "weight" not in given:
        remarks.changes.add("flags")
    if 1 in given.values() and role != "assistant":
        remarks.note(
            f"`{next(iter(given))}` in messages that are not the assistant's has no effect: only answers are learned"
        )
    return {"weight": next(iter(given.values()))} if given else {}


def _switch(value: Any, key: str, place: str) -> int:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return int(value)
    raise RowError(f"{place}.{key}: expected {'0 or 1' if key == 'weight' else 'true or false'}, got {describe(value)}")


def _content(content: Any, place: str) -> str:
    """The text of a message; a list of text parts is joined."""
    if content is None:
        raise RowError(f"{place}: missing `content`")
    if isinstance(content, list):
        return "".join(_part(part, f"{place}.content[{index}]") for index, part in enumerate(content))
    return _text(content, f"{place}.content")


def _part(part: Any, place: str) -> str:
    part = _object(part, place)
    if part.get("type") != "text":
        raise RowError(f"{place}: only parts of type text can be learnt, got type {part.get('type')!r}")
    return _text(_key(part, "text", place), f"{place}.text")


SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _parse_sharegpt(record: Record) -> Example:
    turns = _turns(record.list("conversations"), record.name("conversations"), record.remarks)
    return _chat(_with_system(turns, record), _tools(record), record.remarks)


def _turns(turns: list[Any], name: str, remarks: Remarks) -> list[Message]:
    return [_turn(turn, f"{name}[{place}]", remarks) for place, turn in enumerate(turns)]


def _turn(turn: Any, place: str, remarks: Remarks) -> Message:
    turn = _object(turn, place)
    hint = (
        "; these are OpenAI messages: set `format: messages` and `columns: {messages: conversations}`"
        if "role" in turn
        else ""
    )
    sender = _text(_key(turn, "from", place, hint), f"{place}.from")
    if sender not in SHAREGPT_ROLES:
        raise RowError(f"{place}: unknown role {sender!r}; known are {_listed(SHAREGPT_ROLES)}")
    role = SHAREGPT_ROLES[sender]
    value = _text(_key(turn, "value", place), f"{place}.value")
    if not value.strip() and role in ("assistant", "call"):
        raise RowError(f"assistant turn is empty ({place})")
    weight = _weight(turn, "assistant" if role == "call" else role, place, remarks)
    message = _call_turn(value, f"{place}.value", remarks) if role == "call" else {"role": role, "content": value}
    return {**message, **weight}


def _call_turn(value: str, place: str, remarks: Remarks) -> Message:
    """`{"name": ..., "arguments": ...}`, or a list of them, as an assistant turn that calls tools."""
    decoded = _decoded(value, place)
    calls = decoded if isinstance(decoded, list) else [decoded]
    return {"role": "assistant", "content": "", "tool_calls": [_call(call, place, remarks) for call in calls]}


CRITIQUE_INSTRUCTION = "Please critique whether the following solution to the question is correct."


def _parse_critique(record: Record) -> Example:
    """The published form of critique data: instruction, question and solution in the user's turn (arXiv:2501.17703)."""
    question, answer = record.filled_text("question"), record.filled_text("answer")
    given = record.get("verdict") if record.get("verdict") != "" else None  # "": an empty cell of a table
    said = as_verdict(given) if given is not None else None
    if given is not None and said is None:
        raise RowError(
            f"column `{record.name('verdict')}`: expected right or wrong, got {describe(record.get('verdict'))}"
        )
    critique = record.filled_text("critique")
    if said is not None and (concluded := verdict(critique)) not in (None, said):
        raise RowError(f"the critique concludes {concluded}, column `{record.name('verdict')}` says {said}")
    return _asked(critique_request(question, answer), critique)


def critique_request(question: str, answer: str) -> str:
    """What a model is asked when it is to critique an answer."""
    return f"{CRITIQUE_INSTRUCTION}\nQuestion:\n{question}\n\nSolution:\n{answer}"


def _asked(user: str, assistant: str) -> Chat:
    return Chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], loss_turns=(1,))


def _parse_preference(record: Record) -> Example:
    """Prompt with two completions, two conversations, or two whole transcripts."""
    if record.get("prompt") is not None or not isinstance(record.get("chosen"), str):
        _note_unread_question(record)
    (chosen, first), (rejected, second) = (_preference_side(record, column) for column in ("chosen", "rejected"))
    return _pair(record, chosen, rejected, (first, second))


def _note_unread_question(record: Record) -> None:
    """Note columns that would be the question of pairs of texts without `prompt`, unless the prompt holds them."""
    prompt = record.get("prompt")
    for name in ("instruction", "input", "history"):
        value = record.get(name)
        if value and not (isinstance(prompt, str) and str(value).strip() in prompt):
            record.remarks.note(
                f"column `{record.name(name)}` is not read: the question stands in the prompt or in the answers"
            )


def _preference_side(record: Record, column: str) -> tuple[Answer, bool]:
    """An answer with its prompt, and whether the column holds both although there is a column `prompt`."""
    answer, prompt = record.need(column), record.get("prompt")
    if not isinstance(answer, list | dict) and not isinstance(prompt, list):
        return _text_side(record, column)
    turns = _messages(_to_messages(answer, "assistant"), record.name(column), record.remarks)
    if isinstance(prompt, list):
        whole = _joined(_messages(prompt, record.name("prompt"), record.remarks), turns)
        if whole.repeats:
            _note_repeated(record)
        return _judged(whole.messages, record, column), whole.repeats
    before = [] if prompt is None else _question_before(turns, record)
    return _judged(before + turns, record, column), prompt is not None and not before


def _question_before(turns: list[Message], record: Record) -> list[Message]:
    """The prompt, a text, as a message before turns that begin with the answer.
    Whole conversations begin with it already."""
    text = record.text("prompt")
    if turns and turns[0]["role"] == "assistant":
        return [{"role": "user", "content": text}]
    if not any(text.strip() in turn["content"] for turn in turns):
        record.remarks.note(f"column `{record.name('prompt')}` is not read where the answers are whole conversations")
    return []


def _text_side(record: Record, column: str) -> tuple[Answer, bool]:
    text, place = record.filled_text(column), f"column `{record.name(column)}`"
    if record.get("prompt") is None and isinstance(record.get("instruction"), str):
        record.remarks.changes.add("instruction_of_pairs")
        turns = [*_alpaca_question(record), {"role": "assistant", "content": text}]
        return _judged(turns, record, column), False
    _note_unread_tools(record)
    if record.get("prompt") is None:
        return _add_system(_transcript(text, place), record), False
    prompt = record.text("prompt")
    rest = _after_prompt(prompt, text)
    if rest is not None and not rest.strip():
        raise RowError(f"{place}: holds the prompt alone; there is no answer to judge")
    whole = PromptCompletion(prompt, rest) if rest is not None else _transcript_of(prompt, text)
    answer = _add_system(whole or PromptCompletion(prompt, text), record)
    if whole is None:
        return answer, False
    _note_repeated(record)
    return answer, True


def _add_system(answer: Answer, record: Record) -> Answer:
    """An answer with the text of the column `system`, where it has a place for it."""
    if not (system := record.system()):
        return answer
    if isinstance(answer, Chat):
        return _chat(_with_system(answer.messages, record), None, record.remarks)
    if isinstance(answer, PromptCompletion):
        return replace(answer, system=system)
    record.remarks.note(f"column `{record.name('system')}` is not read beside answers without a prompt")
    return answer


def _transcript_of(prompt: str, text: str) -> Chat | None:
    """A transcript in which the prompt is what the human says."""
    try:
        whole = _transcript(text.lstrip(), "")
    except RowError:
        return None
    said = [turn["content"] for turn in whole.messages if turn["role"] == "user"] if isinstance(whole, Chat) else []
    return whole if isinstance(whole, Chat) and prompt.strip() in said else None


def _judged(messages: list[Message], record: Record, column: str) -> Chat:
    """A conversation that ends with the answer to judge."""
    place = f"column `{record.name(column)}`"
    if messages and messages[-1]["role"] != "assistant":
        raise RowError(f"{place}: the last turn is not the assistant's; there is no answer to judge")
    if messages and messages[-1].get("weight") == 0:
        raise RowError(f"{place}: the last message has weight 0 (or train, loss: false), but it is the answer to judge")
    return _chat(_with_system(messages, record), _tools(record), record.remarks)


class _Whole(NamedTuple):
    messages: list[Message]
    start: int
    """Place of the first message of the answer."""
    repeats: bool
    """Whether the answer repeated the prompt, or its end."""


def _joined(prompt: list[Message], answer: list[Message]) -> _Whole:
    """Prompt and answer as one conversation. What the answer repeats of the prompt stands there once.

    A system message may stand in one of the two only. Raises RowError if they begin with different ones.
    """
    systems = [each[0] for each in (prompt, answer) if each and each[0]["role"] == "system"]
    if len(systems) == 2 and not _same(*systems):
        raise RowError("the prompt and the answer begin with different system messages; give one of them")
    is_own = len(systems) == 1 and answer[0] is systems[0]
    head, rest = (answer[:1], answer[1:]) if is_own else ([], answer)
    for count in range(min(len(prompt), len(rest)), 0, -1):
        repeated = rest[:count]
        if any(turn["role"] == "user" for turn in repeated) and all(map(_same, prompt[-count:], repeated)):
            return _Whole([*head, *prompt, *rest[count:]], len(head) + len(prompt), repeats=True)
    if len(systems) == 2:
        return _Whole(prompt + answer[1:], len(prompt), repeats=True)
    return _Whole(prompt + answer, len(prompt), repeats=False)


def _same(one: Message, other: Message) -> bool:
    return bool(one["role"] == other["role"] and one["content"].strip() == other["content"].strip())


def _after_prompt(prompt: str, text: str) -> str | None:
    """What follows the prompt in a text that begins with it; None if it does not,
    or if the prompt is a single word, which may be chance."""
    stem = prompt.strip()
    if not stem or stem.isalnum():
        return None
    if text.startswith(prompt):
        rest = text[len(prompt) :]
    elif text.lstrip().startswith(stem):
        rest = text.lstrip()[len(stem) :].removeprefix(prompt[len(prompt.rstrip()) :])
    else:
        return None
    return None if prompt[-1:].isalnum() and rest[:1].isalnum() else rest


def _note_repeated(record: Record) -> None:
    record.remarks.note("the answers of some rows begin with their prompt, which is written once")
    record.remarks.changes.add("repeated_prompt")


_SPEAKER = re.compile(r"\n\n(Human|Assistant):[ ]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _transcript(text: str, place: str) -> Answer:
    """`\\n\\nHuman: ... \\n\\nAssistant: ...` as a conversation, any other text as it stands."""
    opening, *parts = _SPEAKER.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if not parts or opening.strip():
        return Text(text)
    turns = [
        {"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise RowError(f"{place}: the transcript does not end with an answer of the assistant")
    return Chat(turns, loss_turns=(len(turns) - 1,))


def _parse_sharegpt_preference(record: Record) -> Example:
    before = _turns(record.list("conversations"), record.name("conversations"), record.remarks)
    before = _with_system(before, record)
    sides = [_sharegpt_side(record, column, before) for column in ("chosen", "rejected")]
    return _pair(record, sides[0][0], sides[1][0], (sides[0][1], sides[1][1]))


def _sharegpt_side(record: Record, column: str, before: list[Message]) -> tuple[Chat, bool]:
    """An answer, one turn or several that may begin with the conversation,
    behind the conversation; and whether they do."""
    answer, place = record.need(column), f"column `{record.name(column)}`"
    if isinstance(answer, list):
        whole = _joined(before, _turns(answer, record.name(column), record.remarks))
        if whole.repeats:
            _note_repeated(record)
        return _judged(whole.messages, record, column), whole.repeats
    turn = {"from": "gpt", "value": answer} if isinstance(answer, str) else answer
    messages = [*before, _turn(turn, place, record.remarks)]
    chat = _judged(messages, record, column)
    return replace(chat, loss_turns=chat.loss_turns[-1:]), False


def _parse_prompts(record: Record) -> Example:
    """The other columns are not learnt; reward functions see them."""
    given = record.need("prompt")
    if not isinstance(given, list):
        _note_unread_tools(record)
        if record.name("prompt") == "instruction" and record.row.get("input"):
            record.remarks.note("column `input` is not read: it is no part of the prompt")
        return Prompt(record.filled_text("prompt"), record.system())
    name = record.name("prompt")
    turns = _bare(_messages(given, name, record.remarks))
    if not turns or turns[-1]["role"] == "assistant":
        raise RowError(f"column `{name}`: the last turn is not one that an assistant answers")
    return Prompt(Chat(_with_system(turns, record), (), _tools(record)))


def _number(value: Any) -> Any:
    """A number that is written in a cell of a table; an empty cell is none."""
    try:
        return (float(value) if value.strip() else None) if isinstance(value, str) else value
    except ValueError:
        return value


def _pair(record: Record, chosen: Answer, rejected: Answer, repeats: tuple[bool, bool]) -> Pair:
    names = f"`{record.name('chosen')}` and `{record.name('rejected')}`"
    if _first_question(chosen) != _first_question(rejected):
        record.remarks.note(f"columns {names} answer different questions in some rows, so they cannot be compared")
    if chosen == rejected:
        raise RowError(f"columns {names} are the same: nothing is preferred")
    if repeats[0] != repeats[1]:
        with_prompt, without = ("chosen", "rejected") if repeats[0] else ("rejected", "chosen")
        message = (
            f"column `{record.name(with_prompt)}` begins with the prompt, column `{record.name(without)}` does not"
        )
        raise RowError(f"{message}; give both with it or both without")
    margin = _number(record.get("margin"))
    if margin is None:
        return Pair(chosen, rejected)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise RowError(f"column `{record.name('margin')}`: expected a number of at least 0, got {describe(margin)}")
    return Pair(chosen, rejected, float(margin))


def _first_question(answer: Answer) -> str:
    messages = answer.messages if isinstance(answer, Chat) else []
    return next((str(message["content"]).strip() for message in messages if message["role"] == "user"), "")


FORMATS: dict[str, Format] = {
    "text": Format(("text",), (), _parse_text),
    "prompt_completion": Format(("prompt", "completion"), ("system", "tools"), _parse_prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _parse_alpaca),
    "sharegpt": Format(("conversations",), ("system", "tools"), _parse_sharegpt),
    "messages": Format(("messages",), ("system", "tools"), _parse_messages),
    "critique": Format(("question", "answer", "critique"), ("verdict",), _parse_critique),
    "preference": Format(
        ("chosen", "rejected"),
        ("prompt", "instruction", "input", "history", "system", "margin", "tools"),
        _parse_preference,
    ),
    "sharegpt_preference": Format(
        ("conversations", "chosen", "rejected"), ("system", "margin", "tools"), _parse_sharegpt_preference
    ),
    "prompts": Format(("prompt",), ("system", "tools"), _parse_prompts),
}
