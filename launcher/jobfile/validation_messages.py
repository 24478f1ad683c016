"""Pydantic's errors in plain words: what was got, what is expected, what was perhaps meant. Knows no files."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from launcher.jobfile.other_tools import name_here
from launcher.jobfile.yaml_with_lines import KeyPath, dotted
from training.config import IncompatibleSettings

Model = TypeVar("Model", bound=BaseModel)

UNKNOWN_KEY = "unknown key"
REQUIRED = "this key is required"


def validated(model: type[Model], data: Any, add: Callable[[KeyPath, str], None]) -> Model | None:
    """The settings in `data`; None if there are problems, each of which `add` is told with its place in the data."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for path, message in _explained(error, model, data):
            add(path, message)
        return None


def _explained(error: ValidationError, model: type[BaseModel], data: Any) -> list[tuple[KeyPath, str]]:
    """One message for every place in `data` that `model` refused."""
    places: dict[KeyPath, str] = {}
    in_unions: set[KeyPath] = set()
    for detail in error.errors():
        path, chose = _path(detail, data)
        if isinstance(cause := detail.get("ctx", {}).get("error"), IncompatibleSettings):
            places.update({(*path, *key.split(".")): message for key, message in cause.problems})
            continue
        places.setdefault(path, _message(detail, path, model))
        if chose:
            in_unions.add(path)
    return [(path, text) for path, text in places.items() if not (path in in_unions and _has_deeper(path, places))]


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """`; did you mean learning_rate?`, or nothing if no known name is near."""
    near = difflib.get_close_matches(got.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def listed(names: Iterable[str], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    *most, end = names
    return f"{', '.join(most)} {last} {end}" if most else end


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened: `"eight"`, `2.5`, `true`, `a list`."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if value is None:
        return "nothing (null)"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinity"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# Where the error is. Pydantic's `loc` names the union branches it tried between the keys that are in the data.


def _path(detail: ErrorDetails, data: Any) -> tuple[KeyPath, bool]:
    """The path in the data, and whether the error is that of one branch of a union."""
    path: list[str | int] = []
    loc = detail["loc"]
    absent = loc[-1:] if detail["type"] == "missing" else ()
    for part in loc[: len(loc) - len(absent)]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            path.append(part)
            data = data[part]
    return (*path, *absent), len(path) + len(absent) < len(loc)


def _has_deeper(path: KeyPath, places: Iterable[KeyPath]) -> bool:
    """Whether an error lies further inside: then the value has the right shape, and only the inner error says more."""
    return any(len(other) > len(path) and other[: len(path)] == path for other in places)


# What the error says


def _message(detail: ErrorDetails, path: KeyPath, model: type[BaseModel]) -> str:
    kind, got = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), path[:-1], model)
    annotation, example = _expected_at(model, path)
    if kind == "missing":
        return f"{REQUIRED}; for example `{path[-1]}: {flow(_example(annotation, example))}`"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    choices = [choice for choice in _choices(annotation) if isinstance(choice, str)]
    meant = did_you_mean(got, choices) if isinstance(got, str) else ""
    label = " (text)" if isinstance(got, str) and not choices else ""
    finite = "a finite value: " if kind == "finite_number" else ""
    return f"got {shown(got)}{label}, expected {finite}{describe(annotation)}{meant}"


def _unknown_key(key: str, section: KeyPath, model: type[BaseModel]) -> str:
    if here := name_here(key):
        return f"{UNKNOWN_KEY}; {here}"
    expected = _expected_at(model, section)[0]
    known = [
        name for one in (expected, *_entries(expected)) for found in settings_classes(one) for name in keys_of(found)
    ]
    if meant := did_you_mean(key, known):
        return f"{UNKNOWN_KEY}{meant}"
    if elsewhere := [dotted(path) for path in all_keys(model) if path[-1] == key]:
        return f"{UNKNOWN_KEY}; did you mean {listed(elsewhere)}?"
    return f"{UNKNOWN_KEY}; known here: {', '.join(known)}"


def all_keys(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all settings in a settings class and in those inside it."""
    for name, field in keys_of(model).items():
        yield (*prefix, name)
        for inner in settings_classes(field.annotation):
            yield from all_keys(inner, (*prefix, name))


# What is expected, read from the settings' own annotations


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a settings class by the names that a file has for them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def annotation_of(field: FieldInfo) -> Any:
    """What a field takes, with its limits."""
    return Annotated[field.annotation, field] if field.metadata else field.annotation


def _expected_at(model: type[BaseModel], path: KeyPath) -> tuple[Any, Any]:
    """(annotation, example or None) of the value at `path`; (Any, None) where everything is allowed."""
    annotation: Any = model
    example = None
    for part in path:
        annotation, example = next(_inside(annotation, part), (Any, None))
    return annotation, example


def _inside(annotation: Any, part: str | int) -> Iterator[tuple[Any, Any]]:
    for option in _options(annotation):
        bare = bare_of(option)
        if isinstance(part, str) and bare in settings_classes(bare) and part in keys_of(bare):
            field = keys_of(bare)[part]
            yield annotation_of(field), (field.examples or [None])[0]
        elif isinstance(part, int) and get_origin(bare) is list:
            yield get_args(bare)[0], None
        elif isinstance(part, str) and get_origin(bare) is dict:
            yield get_args(bare)[1], None
    if isinstance(part, str):  # one entry, written without its list
        for entry in _entries(annotation):
            yield from _inside(entry, part)


def _entries(annotation: Any) -> list[Any]:
    """What the lists among the options of an annotation hold."""
    bare = [bare_of(option) for option in _options(annotation)]
    return [get_args(option)[0] for option in bare if get_origin(option) is list]


def bare_of(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _limits(annotation: Any) -> list[Any]:
    """annotated_types constraints (Gt, MinLen, ...) of `Annotated[...]`, also those inside a `Field(...)`."""
    if get_origin(annotation) is not Annotated:
        return []
    extras = get_args(annotation)[1:]
    return [limit for extra in extras for limit in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]


def _options(annotation: Any) -> list[Any]:
    """The branches of a union, each with the union's own limits; the annotation itself if it is none."""
    bare = bare_of(annotation)
    if get_origin(bare) not in (Union, types.UnionType):
        return [annotation]
    limits = tuple(_limits(annotation))
    return [Annotated[option, *limits] if limits else option for option in get_args(bare)]


def settings_classes(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that an annotation allows, not looking into lists."""
    options = [bare_of(option) for option in _options(annotation)]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _choices(annotation: Any) -> list[Any]:
    return [choice for option in _options(annotation) if _is_literal(option) for choice in get_args(bare_of(option))]


def _is_literal(annotation: Any) -> bool:
    return get_origin(bare_of(annotation)) is Literal


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe(annotation: Any) -> str:
    """`a whole number > 0`, `drop or truncate`, `auto or a whole number > 0`."""
    words = [str(choice) for choice in _choices(annotation)]
    words += [_describe_one(option) for option in _options(annotation) if not _is_literal(option)]
    if any(word.startswith("a number") for word in words):
        words = [word for word in words if not word.startswith("a whole number")]
    return listed(words)


def _describe_one(annotation: Any) -> str:
    bare, limits = bare_of(annotation), _limits(annotation)
    if bare in _WORDS:
        signs = [f"{sign} {getattr(limit, name)}" for limit in limits for name, sign in _SIGNS if hasattr(limit, name)]
        return " ".join([_WORDS[bare], " and ".join(signs)]).strip()
    if get_origin(bare) is list:
        least = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), 0)
        most = next((limit.max_length for limit in limits if hasattr(limit, "max_length")), None)
        size = f" of {least}" if least and least == most else ""
        return f"a list{size} (each {describe(get_args(bare)[0])})"
    if settings_classes(bare):
        example = _example(bare, None)
        return f"a mapping such as {flow(example)}" if example else "a mapping of settings"
    return (
        "a mapping with at least 1 entry" if any(getattr(limit, "min_length", 0) for limit in limits) else "a mapping"
    )


def _example(annotation: Any, example: Any) -> Any:
    """The example of a field, or one made of the required keys of its settings class."""
    if example is not None or not settings_classes(annotation):
        return "..." if example is None else example
    required = {name: field for name, field in keys_of(settings_classes(annotation)[0]).items() if field.is_required()}
    return {name: _example(field.annotation, (field.examples or [None])[0]) for name, field in required.items()}


def flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    return str(value)
