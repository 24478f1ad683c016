"""From a row to an example: recognises a row's format by its columns and parses it. Knows no file and no tokenizer.

A format is one entry of the table FORMATS: the columns it needs, those it may have, and a function from a record to an
example. Whatever a row is called outside, an example is one of five things: text, a prompt with its completion, a chat, a
pair of these of which one is preferred, or a prompt alone.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.answers import as_verdict, verdict
from training.data.files import RowError, describe
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


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates read (OpenAI's, tool arguments as objects)."""

    messages: list[Message]
    learnt: tuple[int, ...]
    """Places of the assistant turns that are learnt, ascending."""
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


Example = Answer | Pair | Prompt


@dataclass(frozen=True)
class Record:
    """A row seen through the format's names; errors speak in the data's own."""

    row: Mapping[str, Any]
    names: Mapping[str, str]
    """The format's name -> the data's, where they differ."""

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def has(self, column: str) -> bool:
        return self.name(column) in self.row

    def get(self, column: str) -> Any:
        """The value of an optional column: None if it is absent or null."""
        return self.row.get(self.name(column))

    def need(self, column: str) -> Any:
        if not self.has(column):
            raise RowError(f"missing column `{self.name(column)}`; the row has {_listed(self.row)}")
        if self.get(column) is None:
            raise RowError(f"column `{self.name(column)}` is null")
        return self.get(column)

    def text(self, column: str) -> str:
        return _text(self.need(column), f"column `{self.name(column)}`")

    def filled_text(self, column: str) -> str:
        """A text that is more than white space: an answer."""
        text = self.text(column)
        if not text.strip():
            raise RowError(f"column `{self.name(column)}` is empty")
        return text

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

    `format` is one of FORMATS or `auto`, which recognises each row by its columns; `columns` maps a format's names to the
    data's; `allowed` are the formats that the recipe reads, the likeliest first.
    Raises InputError for a format that the recipe does not read and for unknown names in `columns`.
    """

    def __init__(self, format: str, columns: Mapping[str, str], allowed: Sequence[str]):
        self._candidates = tuple(allowed) if format == "auto" else (format,)
        self._columns = columns
        self._auto = format == "auto"
        problems = [] if self._auto or format in allowed else [_foreign_format(format, allowed)]
        known = [name for key in self._candidates for name in _names(FORMATS[key])]
        problems += [_unknown_column(name, known) for name in columns if name not in known]
        if problems:
            raise InputError(problems)

    def __call__(self, row: Mapping[str, Any]) -> tuple[str, Example]:
        """The name of the row's format and the example. Raises RowError."""
        record = Record(row, self._columns)
        key = self._recognise(record) if self._auto else self._candidates[0]
        return key, FORMATS[key].parse(record)

    def _recognise(self, record: Record) -> str:
        for present in (lambda name: record.get(name) is not None, record.has):
            for key in self._candidates:
                if all(map(present, FORMATS[key].required)):
                    return key
        raise _unrecognised(record, self._candidates)


# ── Errors that teach ────────────────────────────────────────────────────────────────────────────────────────────────

OTHER_NAMES = {
    "text": ("content", "document", "body"),
    "prompt": ("question", "query", "problem", "instruction", "input"),
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


def _object(value: Any, place: str) -> dict[str, Any]:
    """The object without its nulls: Parquet writes every absent key as null."""
    if not isinstance(value, dict):
        raise RowError(f"{place}: expected an object, got {describe(value)}")
    return {key: item for key, item in value.items() if item is not None}


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
    tools = _decoded(record.get("tools") or [], place)
    return [_tool(tool, f"{place}[{index}]") for index, tool in enumerate(_list(tools, place))] or None


def _tool(tool: Any, place: str) -> dict[str, Any]:
    tool = _object(_decoded(tool, place), place)
    function = tool if "function" not in tool else _object(tool["function"], f"{place}.function")
    _text(_key(function, "name", place), f"{place}.name")
    return {"type": "function", "function": function}


def _call(call: Any, place: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, the form that chat templates expect."""
    call = _object(call, place)
    function = call if "function" not in call else _object(call["function"], f"{place}.function")
    name = _text(_key(function, "name", place), f"{place}.name")
    place = f"{place}.arguments"
    arguments = _object(_decoded(function.get("arguments") or {}, place), place)
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


# ── Formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_text(record: Record) -> Example:
    return Text(record.filled_text("text"))


def _parse_prompt_completion(record: Record) -> Example:
    prompt, completion = record.need("prompt"), record.need("completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        names = f"`{record.name('prompt')}` and `{record.name('completion')}`"
        got = f"{describe(prompt)} and {describe(completion)}"
        raise RowError(f"columns {names}: expected two texts or two lists of messages, got {got}")
    if not isinstance(prompt, list):
        return PromptCompletion(record.text("prompt"), record.filled_text("completion"))
    before = _messages(prompt, record.name("prompt"))
    return _chat(before + _messages(completion, record.name("completion")), _tools(record), first=len(before))


def _parse_alpaca(record: Record) -> Example:
    question = record.text("instruction")
    if record.get("input") is not None and (extra := record.text("input")):
        question = f"{question}\n{extra}"
    answer = record.filled_text("output")
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], learnt=(1,))


def _parse_messages(record: Record) -> Example:
    return _chat(_messages(record.list("messages"), record.name("messages")), _tools(record))


def _chat(messages: list[Message], tools: list[dict[str, Any]] | None, first: int = 0) -> Chat:
    """The assistant turns from `first` on are learnt, unless they say `weight: 0` or open the conversation unasked."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    learnt = tuple(place for place in turns if place >= max(first, 1) and messages[place].get("weight") != 0)
    if not learnt:
        reason = "all open the conversation, belong to the prompt or have weight 0" if turns else "there is none"
        raise RowError(f"no assistant turn to learn: {reason}")
    return Chat([{k: v for k, v in message.items() if k != "weight"} for message in messages], learnt, tools)


ROLES = ("system", "developer", "user", "assistant", "tool")


def _messages(messages: list[Any], name: str) -> list[Message]:
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, place: str) -> Message:
    message = _object(message, place)
    role = _key(message, "role", place)
    if role not in ROLES:
        raise RowError(f"{place}: unknown role {role!r}; known are {_listed(ROLES)}")
    calls = _list(message.pop("tool_calls", []), f"{place}.tool_calls")
    calls = [_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]
    content = _content(message.get("content", "" if calls else None), place)
    if role == "assistant" and not calls and not content.strip():
        raise RowError(f"assistant turn is empty ({place})")
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


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
}


def _parse_sharegpt(record: Record) -> Example:
    name = record.name("conversations")
    turns = [_turn(turn, f"{name}[{place}]") for place, turn in enumerate(record.list("conversations"))]
    if record.get("system") is not None and (system := record.text("system")):
        turns.insert(0, {"role": "system", "content": system})
    return _chat(turns, _tools(record))


def _turn(turn: Any, place: str) -> Message:
    turn = _object(turn, place)
    hint = "; these are OpenAI messages: set `format: messages` and `columns`" if "role" in turn else ""
    sender = _text(_key(turn, "from", place, hint), f"{place}.from")
    if sender not in SHAREGPT_ROLES:
        raise RowError(f"{place}: unknown role {sender!r}; known are {_listed(SHAREGPT_ROLES)}")
    role = SHAREGPT_ROLES[sender]
    value = _text(_key(turn, "value", place), f"{place}.value")
    if not value.strip() and role in ("assistant", "call"):
        raise RowError(f"assistant turn is empty ({place})")
    return _call_turn(value, f"{place}.value") if role == "call" else {"role": role, "content": value}


def _call_turn(value: str, place: str) -> Message:
    """`{"name": ..., "arguments": ...}`, or a list of them, as an assistant turn that calls tools."""
    decoded = _decoded(value, place)
    calls = decoded if isinstance(decoded, list) else [decoded]
    return {"role": "assistant", "content": "", "tool_calls": [_call(call, place) for call in calls]}


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
    return Chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], learnt=(1,))


def _parse_preference(record: Record) -> Example:
    """Prompt with two completions, two conversations, or two whole transcripts."""
    sides = [_preference_side(record, column) for column in ("chosen", "rejected")]
    return _pair(record, *sides)


def _preference_side(record: Record, column: str) -> Answer:
    answer, prompt = record.need(column), record.get("prompt")
    if isinstance(answer, list):
        turns = _messages(answer, record.name(column))
        # A prompt that is a text repeats what the conversation begins with.
        before = _messages(prompt, record.name("prompt")) if isinstance(prompt, list) else []
        if (before + turns)[-1:] and (before + turns)[-1]["role"] != "assistant":
            raise RowError(
                f"column `{record.name(column)}`: the last turn is not the assistant's; there is no answer to judge"
            )
        return _chat(before + turns, _tools(record))
    text = record.filled_text(column)
    if prompt is not None:
        return PromptCompletion(record.text("prompt"), text)
    return _transcript(text, f"column `{record.name(column)}`")


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
    return Chat(turns, learnt=(len(turns) - 1,))


def _parse_sharegpt_preference(record: Record) -> Example:
    name = record.name("conversations")
    before = [_turn(turn, f"{name}[{place}]") for place, turn in enumerate(record.list("conversations"))]
    sides = []
    for column in ("chosen", "rejected"):
        answer = record.need(column)
        turn = {"from": "gpt", "value": answer} if isinstance(answer, str) else answer
        sides.append(
            _chat([*before, _turn(turn, f"column `{record.name(column)}`")], _tools(record), first=len(before))
        )
    return _pair(record, *sides)


def _parse_prompts(record: Record) -> Example:
    """The other columns are not learnt; reward functions see them."""
    given = record.need("prompt")
    if not isinstance(given, list):
        return Prompt(record.filled_text("prompt"))
    name = record.name("prompt")
    turns = _messages(given, name)
    if not turns or turns[-1]["role"] == "assistant":
        raise RowError(f"column `{name}`: the last turn is not one that an assistant answers")
    return Prompt(Chat(turns, (), _tools(record)))


def _number(value: Any) -> Any:
    """A number that is written in a cell of a table; an empty cell is none."""
    try:
        return (float(value) if value.strip() else None) if isinstance(value, str) else value
    except ValueError:
        return value


def _pair(record: Record, chosen: Answer, rejected: Answer) -> Pair:
    if chosen == rejected:
        names = f"`{record.name('chosen')}` and `{record.name('rejected')}`"
        raise RowError(f"columns {names} are the same: nothing is preferred")
    margin = _number(record.get("margin"))
    if margin is None:
        return Pair(chosen, rejected)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin) or margin < 0:
        raise RowError(f"column `{record.name('margin')}`: expected a number of at least 0, got {describe(margin)}")
    return Pair(chosen, rejected, float(margin))


FORMATS: dict[str, Format] = {
    "text": Format(("text",), (), _parse_text),
    "prompt_completion": Format(("prompt", "completion"), ("tools",), _parse_prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input",), _parse_alpaca),
    "sharegpt": Format(("conversations",), ("system", "tools"), _parse_sharegpt),
    "messages": Format(("messages",), ("tools",), _parse_messages),
    "critique": Format(("question", "answer", "critique"), ("verdict",), _parse_critique),
    "preference": Format(("chosen", "rejected"), ("prompt", "margin", "tools"), _parse_preference),
    "sharegpt_preference": Format(
        ("conversations", "chosen", "rejected"), ("margin", "tools"), _parse_sharegpt_preference
    ),
    "prompts": Format(("prompt",), ("tools",), _parse_prompts),
}
