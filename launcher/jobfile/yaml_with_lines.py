"""YAML text to plain data with the line of every value, by the scalar rules of YAML 1.2. Knows nothing of jobs.

PyYAML alone follows YAML 1.1, where `1e-5` is text, `no` is false, `012` is ten and `12:30` is 750.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.errors import InputError, Problem

KeyPath = tuple[str | int, ...]
"""Where a value sits: ("phases", "sft", "data", "train", 0)."""

JOB_FILE = "job.yaml"
"""Name of the YAML file in a run's folder."""

COMMAND_LINE = 0
"""The "line" of a value that was given on the command line."""

MAX_VALUES = 100_000
"""A file whose aliases expand to more than this is refused: a few lines can stand for billions of values."""


@dataclass
class Document:
    """A YAML file as plain data (dict, list, str, int, float, bool, None), and the line of every key and list item."""

    name: str
    """The file as the user typed it."""
    data: dict[str, Any]
    lines: dict[KeyPath, int]

    def line(self, path: KeyPath) -> int | None:
        """Line of the value at `path`, or of the nearest section around it; None for the whole file."""
        known = (path[:depth] for depth in range(len(path), 0, -1) if path[:depth] in self.lines)
        return next((self.lines[prefix] for prefix in known), None)

    def where(self, path: KeyPath) -> str:
        """`job.yaml:14`, or `command line` for what came from there."""
        line = self.line(path)
        if line == COMMAND_LINE:
            return "command line"
        return self.name if line is None else f"{self.name}:{line}"


def dotted(path: KeyPath) -> str:
    """`phases.sft.data.train.0`: how a message and the command line write a path."""
    return ".".join(map(str, path))


def load(file: Path, name: str | None = None) -> Document:
    """The file as a Document; `name` is what messages call it.
    Raises InputError with every problem that can be told."""
    name = name or str(file)
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise InputError.of(name, "no such file") from None
    except IsADirectoryError:
        advice = f"give a YAML file{f', such as {file / JOB_FILE}' if (file / JOB_FILE).is_file() else ''}"
        raise InputError.of(name, f"is a folder; {advice}") from None
    except OSError as error:
        raise InputError.of(name, f"cannot be read: {error.strerror}") from None
    return parse(_decoded(raw, name), name)


def parse(text: str, name: str) -> Document:
    """The text as a Document. Raises InputError as `load` does."""
    loader, root = _composed(text, name)
    if root is None:
        raise InputError.of(name, "the file is empty")
    if not isinstance(root, yaml.MappingNode):
        raise InputError.of(f"{name}:{_line(root)}", f"expected `key: value` lines, got {_kind(root)}")
    return Document(name, *_plain(loader, root, name))


def parse_value(text: str) -> Any:
    """One value as it would stand in a file: `1e-5`, `[a, b]`, `{path: x}`. Raises InputError."""
    loader, root = _composed(text, "")
    if root is None:
        return None
    return _plain(loader, root, "")[0]


def dump(data: dict[str, Any]) -> str:
    """YAML text that `parse` reads back as equal data. Text that YAML 1.1 would misread is quoted as well."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if not _ODD_BREAKS.search(text):
        return text
    # Line breaks of other alphabets are folded away even inside quotes, so the whole text goes out escaped.
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


# Reading: text -> nodes -> checks on nodes -> plain data

_ODD_BREAKS = re.compile("[\x85\u2028\u2029]")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
)
_CORE_SCHEMA = (  # YAML 1.2.2, section 10.3.2; the first match counts
    ("null", re.compile(r"null|Null|NULL|~|"), ["n", "N", "~", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
)
_TOO_DEEP = "the values are nested too deeply to be read"
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  none of YAML 1.1


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_PREFIX + _tag, re.compile(f"^(?:{_pattern.pattern})$"), _first)
for _tag, _pattern, _first in _CORE_SCHEMA[2:4]:
    _Dumper.add_implicit_resolver(_PREFIX + _tag, re.compile(f"^(?:{_pattern.pattern})$"), _first)


def _integer(text: str) -> int:
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    _PREFIX + "null": lambda text: None,
    _PREFIX + "bool": lambda text: text.lower() == "true",
    _PREFIX + "int": _integer,
    _PREFIX + "float": _number,
    _PREFIX + "str": str,
}
_KINDS = {"null": "nothing (null)", "bool": "a truth value", "int": "a number", "float": "a number", "str": "text"}


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError.of(f"{name}:{line}", f"byte 0x{raw[error.start]:02x} is not UTF-8 text") from None


def _composed(text: str, name: str) -> tuple[_Loader, yaml.Node | None]:
    """The document's nodes (None if it is empty), with the loader that made them."""
    try:
        loader = _Loader(text)
        return loader, loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"the control character 0x{error.character:02x} is not allowed in YAML"
        raise InputError.of(_at(name, line), message) from None
    except yaml.MarkedYAMLError as error:
        line, message = _syntax(error, text)
        raise InputError.of(_at(name, line), f"not valid YAML: {message}") from None
    except RecursionError:
        raise InputError.of(name, _TOO_DEEP) from None


def _plain(loader: _Loader, root: yaml.Node, name: str) -> tuple[Any, dict[KeyPath, int]]:
    lines: dict[KeyPath, int] = {}
    try:
        _checked(root, name)
        return _build(loader, root, (), lines), lines
    except yaml.MarkedYAMLError as error:  # a `<<` with something other than mappings
        raise InputError.of(_at(name, _mark(error).line + 1), f"not valid YAML: {error.problem}") from None
    except RecursionError:
        raise InputError.of(name, _TOO_DEEP) from None


def _checked(root: yaml.Node, name: str) -> None:
    check = _Check(name)
    if check.visit(root, ()) > MAX_VALUES:
        check.refuse(root, (), f"its aliases (`*name`) expand to more than {MAX_VALUES:,} values")
    if check.found:
        raise InputError([problem for _, problem in sorted(check.found, key=lambda found: found[0])])


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    """Plain data of a checked node; notes the lines of all that is in it."""
    if isinstance(node, yaml.ScalarNode):
        return _SCALARS[node.tag](node.value)
    if isinstance(node, yaml.SequenceNode):
        lines.update({(*path, index): _line(item) for index, item in enumerate(node.value)})
        return [_build(loader, item, (*path, index), lines) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    loader.flatten_mapping(node)  # puts what `<<` brings before the mapping's own keys, which win
    pairs = {key.value: (key, value) for key, value in node.value}
    lines.update({(*path, name): _line(key) for name, (key, _) in pairs.items()})
    return {name: _build(loader, value, (*path, name), lines) for name, (_, value) in pairs.items()}


class _Check:
    """Looks at every node once and collects what cannot become plain data."""

    def __init__(self, name: str):
        self.name = name
        self.found: list[tuple[int, Problem]] = []  # with its line
        self.sizes: dict[int, int] = {}
        self.open: set[int] = set()

    def refuse(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.found.append((_line(node), Problem(_at(self.name, _line(node)), dotted(path), message)))

    def visit(self, node: yaml.Node, path: KeyPath) -> int:
        """The number of values that the node stands for once its aliases are expanded."""
        if id(node) in self.open:
            self.refuse(node, path, "contains itself through an alias")
            return 1
        if id(node) not in self.sizes:
            self.open.add(id(node))
            self.sizes[id(node)] = 1 + sum(self.visit(child, inner) for child, inner in self.children(node, path))
            self.open.remove(id(node))
        return self.sizes[id(node)]

    def children(self, node: yaml.Node, path: KeyPath) -> Sequence[tuple[yaml.Node, KeyPath]]:
        if isinstance(node, yaml.ScalarNode):
            self.scalar(node, path)
            return []
        if node.tag not in (_PREFIX + "map", _PREFIX + "seq"):
            self.refuse(node, path, f"the tag {_tag_name(node)} is not supported; leave it out")
        if isinstance(node, yaml.SequenceNode):
            return [(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        self.keys(node, path)
        return [(value, (*path, str(key.value))) for key, value in node.value]

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> None:
        if node.tag not in _SCALARS:
            self.refuse(node, path, f"the tag {_tag_name(node)} is not supported; leave it out")
            return
        try:
            _SCALARS[node.tag](node.value)
        except ValueError:  # an explicit tag that does not fit, or a whole number of thousands of digits
            self.refuse(node, path, f"{_shortened(node.value)} cannot be read as {_kind(node)}")

    def keys(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (_PREFIX + "str", _PREFIX + "merge") or not isinstance(key, yaml.ScalarNode):
                quoted = f'; write "{key.value}" in quotes' if isinstance(key, yaml.ScalarNode) else ""
                self.refuse(key, path, f"a key must be text, got {_kind(key)}{quoted}")
            elif key.value in first_lines:
                message = f"this key is given twice, first in line {first_lines[key.value]}; keep one"
                self.refuse(key, (*path, key.value), message)
            else:
                first_lines[key.value] = _line(key)


# Words for people

_PLAIN_WORDS = (  # (what PyYAML says, what it means, whether the mistake is where the context began)
    ("mapping values are not allowed", "a second `: ` in this line, or a line that is indented too deep", False),
    ("could not find expected ':'", "this line has no `: ` between key and value", True),
    ("found unexpected end of stream", "a quote is opened here and never closed", True),
    ("but found another document", "a second document begins here (`---`); keep one", False),
    (
        "expected '<document start>'",
        "a value is complete before this line, and another begins; a YAML file is one value, such as `key: value` "
        "lines",
        False,
    ),
    ("expected <block end>", "this line's indentation fits none of the lines above", False),
    ("expected ',' or ']'", "a `,` or the closing `]` is missing", False),
    ("expected ',' or '}'", "a `,` or the closing `}` is missing", False),
    ("that cannot start any token", "a value cannot begin with this character; put the value in quotes", False),
    ("found unknown escape character", "unknown escape in double quotes; write `\\\\` for a backslash", False),
    (
        "found undefined alias",
        "an alias without an anchor (`&name`) above it; a value that begins with `*` needs quotes",
        False,
    ),
)


def _syntax(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str]:
    """Line and plain words of what the parser stumbled over."""
    mark = _mark(error)
    lines = text.splitlines() or [""]
    source = lines[min(mark.line, len(lines) - 1)]
    technical = ", ".join(part for part in (error.problem, error.context) if part)
    if re.match(r"\s*\t", source) or (error.problem or "").startswith("found character '\\t'"):
        return mark.line + 1, "a tab in the indentation; YAML is indented with spaces"
    for said, meant, at_context in _PLAIN_WORDS:
        if said in (error.problem or ""):
            start = error.context_mark if at_context and error.context_mark else mark
            return start.line + 1, f"{meant} ({technical})"
    return mark.line + 1, technical


def _mark(error: yaml.MarkedYAMLError) -> yaml.Mark:
    mark = error.problem_mark or error.context_mark
    assert mark is not None, "the composer marks all its errors"
    return mark


def _at(name: str, line: int) -> str:
    return f"{name}:{line}" if name else ""


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return _KINDS.get(node.tag.removeprefix(_PREFIX), "text")


def _tag_name(node: yaml.Node) -> str:
    return node.tag.replace(_PREFIX, "!!")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def paths(data: Any, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every (path, value) in plain data: sections before what is in them."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*prefix, key), value
        yield from paths(value, (*prefix, key))
