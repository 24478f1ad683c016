"""`phases.sft.learning_rate=1e-5` from the command line, laid over a document. Knows nothing of what the keys mean.

The value is YAML (`1e-5`, `true`, `[a, b]`, `{path: x}`) and replaces what stood there, a whole section too. A number picks
an entry of a list: `phases.sft.data.train.0=other.jsonl`. Of two overrides of one key the last counts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from launcher.explain import shown
from launcher.yamlfile import COMMAND_LINE, Document, KeyPath, dotted, parse_value, paths
from training.errors import InputError, Problem


def overlaid(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """The document with the overrides in it, and what is wrong with them. The given document stays as it is."""
    result = Document(document.name, copy.deepcopy(document.data), dict(document.lines))
    problems = []
    for override in overrides:
        try:
            _set(result, *_parsed(override))
        except InputError as error:
            problems += error.problems
    return result, problems


def _refused(what: str, message: str) -> InputError:
    return InputError.of("command line", message, what)


def _parsed(override: str) -> tuple[KeyPath, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise _refused(override, "expected key=value, such as phases.sft.learning_rate=1e-5")
    if not text.strip():
        raise _refused(key, "has no value; write null for none or '\"\"' for empty text")
    try:
        return tuple(parts), parse_value(text)
    except InputError as error:
        raise _refused(key, error.problems[0].message) from None


def _set(document: Document, path: KeyPath, value: Any) -> None:
    """Puts the value at the path, makes the sections that lead there, and notes that they came from the command line."""
    section: Any = document.data
    real: KeyPath = ()
    for part in path[:-1]:
        step = _step(section, real, part)
        if isinstance(section, dict) and step not in section:
            section[step] = {}
            document.lines[(*real, step)] = COMMAND_LINE
        section, real = section[step], (*real, step)
    last = _step(section, real, path[-1])
    section[last] = value
    _forget(document.lines, (*real, last))
    document.lines.update({(*real, last, *inner): COMMAND_LINE for inner in [(), *(path for path, _ in paths(value))]})


def _step(section: Any, path: KeyPath, part: str | int) -> str | int:
    """The key or list index that `part` means inside `section`."""
    if isinstance(section, dict):
        return part
    what = dotted((*path, part))
    if not isinstance(section, list):
        raise _refused(what, f"{dotted(path)} is {shown(section)} and has no keys inside")
    if not str(part).isdecimal() or int(part) >= len(section):
        raise _refused(what, f"{dotted(path)} is a list; its entries are 0 to {len(section) - 1}")
    return int(part)


def _forget(lines: dict[KeyPath, int], path: KeyPath) -> None:
    for known in [known for known in lines if known[: len(path)] == path]:
        del lines[known]
