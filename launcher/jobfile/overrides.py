"""`phases.sft.learning_rate=1e-5` from the command line, laid over a document. Of the keys' meaning it knows only that
`phases` has entries that are not made by reaching into them.

The value is YAML (`1e-5`, `true`, `[a, b]`, `{path: x}`) and replaces what stood there, a whole section too. A number
picks an entry of a list: `phases.sft.data.train.0=other.jsonl`. Of two overrides of one key the last counts. One that a
later override of a whole section wipes out is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.jobfile.other_tools import name_here
from launcher.jobfile.validation_messages import did_you_mean, shown
from launcher.jobfile.yaml_with_lines import COMMAND_LINE, Document, KeyPath, dotted, parse_value, paths
from training.errors import InputError, Problem


def overlaid(document: Document, overrides: Sequence[str]) -> tuple[Document, list[KeyPath], list[Problem]]:
    """The document with the overrides in it, the paths that they have set, and what is wrong with them.

    The given document stays as it is.
    """
    result = Document(document.name, copy.deepcopy(document.data), dict(document.lines))
    set_paths: list[KeyPath] = []
    problems = []
    for override in overrides:
        try:
            path, value = parsed(override)
            set_paths.append(_set(result, path, value))
        except InputError as error:
            problems += error.problems
    return result, set_paths, problems + list(_wiped_out(result, set_paths))


def _wiped_out(document: Document, set_paths: Sequence[KeyPath]) -> Iterator[Problem]:
    """Overrides that a later one wipes out together with the section around them, without a value in their place."""
    present = {path for path, _ in paths(document.data)}
    for index, path in enumerate(set_paths):
        for later in set_paths[index + 1 :]:
            if path not in present and len(later) < len(path) and path[: len(later)] == later:
                advice = f"{dotted(later)}=... after it replaces the whole section; give it after that, or inside it"
                yield Problem("command line", dotted(path), f"has no effect: {advice}")


def _refused(what: str, message: str) -> InputError:
    return InputError.of("command line", message, what)


def parsed(override: str) -> tuple[KeyPath, Any]:
    """Path and value of `key=value`. Raises InputError."""
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


def _set(document: Document, path: KeyPath, value: Any) -> KeyPath:
    """Puts the value at the path, makes the sections that lead there, and notes that they came from the command line.

    Answers with the path, list entries as numbers. null becomes a section: `lora: null` is the absence of one.
    """
    section: Any = document.data
    real: KeyPath = ()
    for part in path[:-1]:
        step = _step(section, real, part)
        if isinstance(section, dict) and section.get(step) is None:
            if real == ("phases",):
                raise _refused(dotted(path), _no_phase(str(step), section))
            section[step] = {}
            document.lines[(*real, step)] = COMMAND_LINE
        section, real = section[step], (*real, step)
    last = _step(section, real, path[-1])
    if real == ("phases",) and last not in section and not isinstance(value, dict):
        raise _refused(dotted(path), _no_phase(str(last), section, is_setting=not did_you_mean(str(last), section)))
    if not _repeats(value, section, last):
        section[last] = value
    _forget(document.lines, (*real, last))
    document.lines.update({(*real, last, *inner): COMMAND_LINE for inner in [(), *(path for path, _ in paths(value))]})
    return (*real, last)


def _repeats(value: Any, section: Any, key: str | int) -> bool:
    """Whether a number stands there already, written another way: 3.0 for 3 must not make another job."""
    numbers = (int, float)
    present = section[key] if not isinstance(section, dict) or key in section else None
    return type(value) in numbers and type(present) in numbers and value == present


def _no_phase(name: str, phases: Any, *, is_setting: bool = False) -> str:
    if here := name_here(name):
        return f"there is no phase {name}; {here}"
    if is_setting:
        return f"there is no phase {name}; a setting of a phase is phases.NAME.{name}; phases: {', '.join(phases)}"
    advice = did_you_mean(name, phases) or f"; phases: {', '.join(phases)}"
    return f"there is no phase {name}{advice} (`phases.{name}={{...}}` adds one)"


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
