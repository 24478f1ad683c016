"""What a reward function can be given, and what it asks for: read from its source, without running it. Free of torch.

A function is called by keyword, as TRL calls its own: `prompts`, `completions`, `completion_ids`, and every other
column of the prompts. Source: https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import Phase, RewardSource
from training.errors import InputError, Problem

if TYPE_CHECKING:
    from training.data.token_store import TokenStore

GIVEN = ("prompts", "completions", "completion_ids")
"""Arguments that a function is given beside the columns."""
NOT_GIVEN = ("trainer_state", "log_extra", "log_metric")
"""Arguments of TRL's trainers for which there is nothing here."""
RESERVED = GIVEN + NOT_GIVEN
"""A column of such a name cannot be an argument: it is left out, as TRL does."""
LOOKED_AT = 1000
"""Rows whose columns are looked at."""


@dataclass(frozen=True)
class Signature:
    """The parameters of a function."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool
    """It has `**kwargs`."""
    positional_only: tuple[str, ...] = ()

    def accepts(self, name: str) -> bool:
        return self.takes_any or name in self.required or name in self.optional


def signature_of(function: Callable[..., Any]) -> Signature | None:
    """Of an imported function; None for a callable that does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return Signature(
        required=tuple(one.name for one in named if one.default is one.empty),
        optional=tuple(one.name for one in named if one.default is not one.empty),
        takes_any=any(one.kind is one.VAR_KEYWORD for one in parameters),
        positional_only=tuple(
            one.name for one in parameters if one.kind is one.POSITIONAL_ONLY and one.default is one.empty
        ),
    )


def check(phase: Phase, prompts: TokenStore | None = None) -> list[str]:
    """Raises InputError for a reward function that is not where its path says, or that asks for what there is not.

    `prompts`: None if they cannot be read yet. Returns what could not be looked at.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    rows = _first_rows(prompts) if prompts is not None and _functions(phase) else None
    for source in _functions(phase):
        try:
            notes += _checked(source, phase, rows)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return notes


def notes(phase: Phase, prompts: TokenStore) -> list[str]:
    """What the user should know of how the reward functions of a phase are called."""
    if not _functions(phase):
        return []
    rows, column = _first_rows(prompts), prompt_column(phase)
    found = []
    if taken := [f"`{name}`" for name in RESERVED if name != column and any(name in row for row in rows)]:
        found.append(
            f"reward functions do not see the data's columns {', '.join(taken)}: arguments have these names; rename a "
            "column to use it"
        )
    if any(is_conversation(row.get(column)) for row in rows):
        found.append(
            "prompts are conversations: reward functions get each completion as a list of one message, as in TRL "
            '(completion[0]["content"])'
        )
    return found


def _functions(phase: Phase) -> list[RewardSource]:
    return [source for source in phase.rewards if source.is_function]


def _first_rows(prompts: TokenStore) -> list[dict[str, Any]]:
    return [prompts.row(index) for index in range(min(len(prompts), LOOKED_AT))]


def prompt_column(phase: Phase) -> str:
    """What the data call the prompt."""
    return phase.data.columns.get("prompt", "prompt")


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, not a text."""
    return isinstance(prompt, list)


def _checked(source: RewardSource, phase: Phase, rows: list[dict[str, Any]] | None) -> Iterator[str]:
    where, _, name = source.path.rpartition(":")
    file = Path(where) if where.endswith(".py") else _file_of(where, source.folder)
    if file is None:
        yield f"the module {where} of the reward {source.path} was not found here; the workers must have it"
        return
    signature = _read(file, name, source.path)
    if signature is not None:
        _refuse_what_is_missing(source, signature, phase, rows)


def _refuse_what_is_missing(
    source: RewardSource, signature: Signature, phase: Phase, rows: list[dict[str, Any]] | None
) -> None:
    """Raises InputError for parameters without a default that nothing is given for."""
    if signature.positional_only:
        names = ", ".join(signature.positional_only)
        raise InputError.of("", f"{source.path} takes {names} by position alone; it is called by keyword", "reward")
    column = prompt_column(phase)
    problems = []
    for name in signature.required:
        if name in GIVEN:
            continue
        if name in NOT_GIVEN:
            advice = f"give it a default: `{name}=None`"
            problems.append(f"{source.path} asks for `{name}`, which only TRL's trainers have; {advice}")
        elif rows is not None and (name == column or not any(name in row for row in rows)):
            columns = dict.fromkeys(key for row in rows for key in row if key not in (column, *RESERVED))
            listed = ", ".join(columns) or "no other columns"
            prompt = "; the prompts come as `prompts`" if name in (column, "prompt") else ""
            problems.append(f"{source.path} asks for `{name}`, which is no column of the prompts ({listed}){prompt}")
    if problems:
        raise InputError([Problem("", "reward", problem) for problem in problems])


def _file_of(module: str, folder: str | None) -> Path | None:
    """The source file of a module, found without importing it or its packages. None: not found, or not in Python."""
    folders: list[str] | None = [*sys.path, *([folder] if folder else [])]
    for part in module.split("."):
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _read(file: Path, name: str, path: str) -> Signature | None:
    """The signature of a function in a file; None if it is made otherwise than by `def`.

    Raises InputError if the file is no Python, or nothing in it has this name.
    """
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else error
        raise InputError.of("", f"{file}{line} cannot be read: {message}", "reward") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = next((node for node in reversed(functions) if node.name == name), None)
    if found is not None:
        return None if found.decorator_list else _signature(found.args)
    if not _may_define(tree, name):
        there = ", ".join(node.name for node in islice(functions, 5)) or "no functions"
        raise InputError.of("", f"{path}: {file} has no function `{name}`; it has {there}", "reward")
    return None


def _signature(given: ast.arguments) -> Signature:
    positional = [one.arg for one in (*given.posonlyargs, *given.args)]
    without_default = positional[: len(positional) - len(given.defaults)]
    only = {one.arg for one in given.posonlyargs}
    keyword = [(one.arg, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    required = [name for name in without_default if name not in only]
    named = [one.arg for one in given.args]
    return Signature(
        required=(*required, *(name for name, default in keyword if default is None)),
        optional=(
            *(name for name in named if name not in required),
            *(name for name, default in keyword if default is not None),
        ),
        takes_any=given.kwarg is not None,
        positional_only=tuple(name for name in without_default if name in only),
    )


def _may_define(tree: ast.Module, name: str) -> bool:
    """Whether something in a file could give a value to a name at its top level."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(names=names) | ast.Import(names=names):
                if any(one.name == "*" or (one.asname or one.name) == name for one in names):
                    return True
            case ast.Name(id=name_, ctx=ast.Store()) if name_ == name:
                return True
            case ast.ClassDef(name=name_) | ast.FunctionDef(name=name_) if name_ in (name, "__getattr__"):
                return True
    return False
