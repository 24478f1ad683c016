"""Finds columns and keys of rows that seem to decide what is learned but that nothing reads, and reports them
once per data set.

Columns that are plainly metadata (id, source, scores) are not mentioned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LEAVE_OUT = "parts are left out of the loss by `weight: 0`, `train: false` or `loss: false` in a message"
_THOUGHTS = "thoughts are learned where they stand in the answer, or in `reasoning_content` of a message"
_MEDIA = "only text is learned"

_BY_COLUMN = {
    "system": ("system_prompt", "system_message", "sys_prompt"),
    "history": ("chat_history", "conversation_history", "previous_turns"),
    "tools": ("functions", "available_tools", "tool_schemas"),
}
"""What other tools call a column of the formats."""

_ADVICE = {
    _LEAVE_OUT: (
        "mask",
        "masked",
        "loss_mask",
        "train_mask",
        "train_on_turn",
        "train_on_inputs",
        "train",
        "loss",
        "is_train",
    ),
    _THOUGHTS: ("thinking", "reasoning", "reasoning_content", "thought", "thoughts", "chain_of_thought"),
    _MEDIA: ("image", "images", "video", "videos", "audio", "audios"),
    "sources are weighted by `{path, weight}` in data.train, rows cannot be": ("weight", "weights", "sample_weight"),
    "a label does not change what is learned": ("label",),
    "the row holds two forms; set data.format to choose": ("messages", "conversations"),
    "it is no part of the prompt": ("context", "input", "instruction", "question", "query"),
}
_COLUMNS = {name: advice for advice, names in _ADVICE.items() for name in names}
_COLUMNS |= {name: "" for column, names in _BY_COLUMN.items() for name in (column, *names)}
_FLAGS = {*_ADVICE[_LEAVE_OUT], "label"}
"""Columns that mean something if they hold switches; as numbers
or texts they are metadata (a loss that was measured)."""
_OTHER_FORMS = ("messages", "conversations")
"""Columns that hold the whole row in another form."""
_PROMPTS = ("context", "input", "instruction", "question", "query")
"""Columns that may be meant for the prompt."""

_MESSAGE_KEYS = {
    "mask", "masked", "loss_mask", "train_mask", "train_on_turn", "train_detail", "training", "trainable", "learn",
}  # fmt: skip


def unread_columns(row: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> list[str]:
    """What to say of the columns of a row that are not read. `columns`: the format's names
    and what the data call them."""
    if format == "text" or _COLUMNS.keys().isdisjoint(row):  # what stands beside a document is metadata
        return []
    unread = (row.keys() & _COLUMNS.keys()) - set(columns.values())
    return [_sentence(name, format, columns) for name in sorted(unread) if _says_something(row, name, format, columns)]


def _says_something(row: Mapping[str, Any], name: str, format: str, columns: Mapping[str, str]) -> bool:
    value = row[name]
    if value is None or value in ("", [], {}):
        return False
    if name in _OTHER_FORMS and format == "preference":  # beside whole conversations they are what `chosen` holds, too
        return row.get(columns["prompt"]) is None and isinstance(row.get(columns["chosen"]), str)
    if name in _OTHER_FORMS:
        return format in ("prompt_completion", "alpaca")
    if name in _FLAGS:
        return isinstance(value, bool | list)
    if name in _PROMPTS:  # not what the prompt was made of
        prompt = row.get(columns["prompt"]) if "prompt" in columns else value
        return prompt is None or (isinstance(prompt, str) and str(value).strip() not in prompt)
    return True


def _sentence(name: str, format: str, columns: Mapping[str, str]) -> str:
    advice = _COLUMNS[name]
    column = next((column for column, names in _BY_COLUMN.items() if name in (column, *names)), None)
    if format == "preference" and name in (*_PROMPTS, *_OTHER_FORMS):
        advice = f"set data.columns to {{prompt: {name}}} if it is the question"
    elif column in columns:
        advice = f"set data.columns to {{{column}: {name}}}"
    elif column is not None:
        advice = f"{format} has no column `{column}`; give the rows as messages"
    return f"column `{name}` is not read: {advice}"


def unread_keys(message: Mapping[str, Any], place: str) -> list[str]:
    """The same of the keys of a message."""
    column = place.partition("[")[0]
    return [f"key `{name}` in `{column}` is not read: {_LEAVE_OUT}" for name in sorted(message.keys() & _MESSAGE_KEYS)]
