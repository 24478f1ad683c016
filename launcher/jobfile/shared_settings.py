"""Settings at the top of a job that hold for all phases: which phases a top-level override reaches,
and overrides without effect.

A phase's own values win over the top level. In the job.yaml of a run every phase is complete; there `resolved` lists
the values that the user's file had given inside a phase, and a top-level override replaces all others, as it would in
the user's file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.jobfile import raw_deepspeed
from launcher.jobfile.phase_builder import SHARED
from launcher.jobfile.resolved import RESOLVED, is_resolved, sections_of_phases
from launcher.jobfile.validation_messages import did_you_mean, listed
from launcher.jobfile.yaml_with_lines import Document, KeyPath, dotted
from training.config import Phase
from training.io.paths import absolute

_MODEL_PATH: KeyPath = ("model", "path")

OwnSettings = dict[str, list[str]]
"""By phase: dotted paths of the shared settings that its own section gives."""


# A resolved job file


def own_settings(document: Document) -> OwnSettings:
    """What the phases of a user's file set themselves; of a resolved file,
    what its user's file set (unknown: nothing)."""
    recorded = document.data.get(RESOLVED)
    if isinstance(recorded, dict):
        return {name: [str(key) for key in keys] for name, keys in recorded.items() if isinstance(keys, list)}
    if is_resolved(document):
        return {}
    return {
        name: [dotted(path) for key in SHARED if key in section for path, _ in _leaves(section[key], (key,))]
        for name, section in sections_of_phases(document).items()
    }


def unknown_phases(document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Names in `resolved` that are no phases: a phase was renamed,
    and its own values would be taken for inherited ones."""
    recorded, phases = document.data.get(RESOLVED), sections_of_phases(document)
    for name in recorded if isinstance(recorded, dict) else ():
        if name not in phases:
            yield (
                (RESOLVED, name),
                f"there is no phase {name}{did_you_mean(name, phases)}; rename it here too, or remove it",
            )


def unknown_to_deepspeed(document: Document, phases: Mapping[str, Phase]) -> Iterator[tuple[KeyPath, str]]:
    """Settings in `deepspeed` that DeepSpeed does not have. Not of a resolved file: a run
    that began with them goes on."""
    if is_resolved(document):
        return
    for name, phase in phases.items():
        for path, message in raw_deepspeed.unknown(phase.deepspeed):
            yield ("phases", name, "deepspeed", *path), message


def inherit_from_top(document: Document, overridden: Sequence[KeyPath], own: OwnSettings) -> None:
    """Take out of the phases of a resolved document what the top level replaces: overrides,
    and settings added there by hand.

    Without `resolved` only overrides are known to be meant for all phases.
    """
    if not is_resolved(document):
        return
    top = [path for path in overridden if path[0] in SHARED]
    if RESOLVED in document.data:
        top += [path for key in SHARED if key in document.data for path, _ in _leaves(document.data[key], (key,))]
    for name, section in sections_of_phases(document).items():
        kept: list[KeyPath] = [tuple(key.split(".")) for key in own.get(name, ())]
        kept += [path[2:] for path in overridden if path[:2] == ("phases", name)]
        starts_elsewhere = [_MODEL_PATH] if section.get("from") is not None else []  # its path follows from `from`
        for path in (*top, *starts_elsewhere):
            _remove(section, path, kept)


def _remove(section: dict[Any, Any], path: KeyPath, kept: Sequence[KeyPath]) -> None:
    """Delete the settings at, in or around `path`, but those that are kept, and the sections that are empty then."""
    key = path[0]
    for leaf, _ in list(_leaves(section[key], (key,))) if key in section else ():
        if _related(leaf, path) and not any(_related(leaf, own) for own in kept):
            _delete(section, leaf)


def _delete(section: dict[Any, Any], leaf: KeyPath) -> None:
    key, *rest = leaf
    if rest:
        _delete(section[key], tuple(rest))
    if not rest or not section[key]:
        del section[key]


def _related(one: KeyPath, other: KeyPath) -> bool:
    """Whether one of two paths leads to or into the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is no section with something in it."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


# Which overrides have an effect


@dataclass
class Effects:
    """What became of the overrides of shared settings."""

    problems: list[tuple[KeyPath, str]] = field(default_factory=list)
    """Overrides that no phase takes over, with the path to use."""
    notes: list[str] = field(default_factory=list)
    """Overrides that some phases do not take over."""


def effects(
    written: Document, document: Document, overridden: Sequence[KeyPath], phases: Mapping[str, Phase]
) -> Effects:
    """Compare the overrides of a document, which were laid over `written`, with the phases that came of it."""
    result = Effects()
    settings = {name: phase.model_dump(by_alias=True) for name, phase in phases.items()}
    for path in dict.fromkeys(overridden):
        if path[0] == RESOLVED:
            result.problems.append((path, "is written by Muster and cannot be overridden"))
        for leaf, value in _given(document, path) if path[0] in SHARED else ():
            _check_top_level(result, document, leaf, value, phases, settings)
        if path[0] == "phases" and len(path) > 2 and str(path[1]) in phases:
            for leaf, value in _given(document, path):
                _check_phase(result, leaf, value, phases[str(path[1])], settings[str(path[1])], written)
    return result


def advised_path(document: Document, own: OwnSettings, phase: str, setting: str) -> str:
    """The path by which the command line reaches a shared setting of a phase."""
    path: KeyPath = tuple(setting.split("."))
    if is_resolved(document):
        is_own = any(_related(path, tuple(key.split("."))) for key in own.get(phase, ()))
    else:
        is_own = _own_path(sections_of_phases(document)[phase], path) is not None
    return f"phases.{phase}.{setting}" if is_own else setting


def _given(document: Document, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """The settings that an override gives, one by one."""
    value: Any = document.data
    for part in path:
        value = value[part]
    if path == ("deepspeed",) and isinstance(value, str):
        value = raw_deepspeed.read(Path(absolute(value)))[0]
    if value != {}:
        yield from _leaves(value, path)


def _check_top_level(
    result: Effects,
    document: Document,
    leaf: KeyPath,
    value: Any,
    phases: Mapping[str, Phase],
    settings: dict[str, Any],
) -> None:
    winners: list[KeyPath] = []
    reached = False
    for name, phase in phases.items():
        if leaf == _MODEL_PATH and phase.starts_from_phase:
            continue  # its weights are those that the earlier phase started from
        in_phase = _winners(document, name, phase, settings[name], leaf, value)
        winners += [("phases", name, *path) for path in in_phase.paths]
        reached |= in_phase.reached
    if not winners:
        return
    use = listed((_assignment(path, leaf, value) for path in winners), "and")
    if reached:
        where = listed(dict.fromkeys(str(path[1]) for path in winners), "and")
        result.notes.append(
            f"{dotted(leaf)}={_text(value)} does not reach the phase {where}, which has a value of its own; use {use}"
        )
    else:
        result.problems.append((leaf, f"has no effect: every phase has a value of its own; use {use}"))


def _check_phase(
    result: Effects, leaf: KeyPath, value: Any, phase: Phase, settings: dict[str, Any], written: Document
) -> None:
    """An override inside a phase that groups of workers have their own values for,
    or that other settings leave unused."""
    for key, why in phase.settings_without_effect():
        if dotted(leaf[2:]) == key and value_at(written.data, leaf) != value:
            result.problems.append((leaf, f"has no effect: {why}"))
    winners = _group_winners(settings, leaf[2:], value)
    if winners is not None and winners.paths and not winners.reached:
        use = listed((f"{dotted((*leaf[:2], *path))}={_text(value)}" for path in winners.paths), "and")
        result.problems.append((leaf, f"has no effect: every group has a value of its own; use {use}"))


@dataclass
class _Winners:
    """Values of a phase that win over one at the top of the job."""

    paths: list[KeyPath]
    """In the phase."""
    reached: bool
    """Whether the phase takes the value over nevertheless, or has the same."""


def _winners(document: Document, name: str, phase: Phase, settings: Any, leaf: KeyPath, value: Any) -> _Winners:
    if leaf == _MODEL_PATH and phase.from_ is not None:
        same = _same(phase.model.path, value)
        return _Winners([] if same else [("from",)], reached=same)
    in_groups = _group_winners(settings, leaf, value) or _Winners([], reached=True)
    own = _own_path(sections_of_phases(document)[name], leaf)
    if in_groups.reached and own is not None and not _same(value_at(settings, leaf), value):
        return _Winners([own], reached=False)
    return in_groups


def _group_winners(settings: Any, leaf: KeyPath, value: Any) -> _Winners | None:
    """Of PPO's groups, which have workers of their own and perhaps a sharding; None for other settings and phases."""
    groups = settings.get("groups")
    inside = leaf[1:] if leaf == ("resources", "workers") else leaf
    if not groups or (leaf[0] != "sharding" and inside == leaf):
        return None
    with_own = [index for index, group in enumerate(groups) if group[inside[0]] is not None]
    other = [index for index in with_own if not _same(value_at(groups[index], inside), value)]
    return _Winners([("groups", index, *inside) for index in other], reached=len(other) < len(groups))


def _own_path(section: dict[str, Any], leaf: KeyPath) -> KeyPath | None:
    """The setting of a phase's section that wins over `leaf` at the top; None if there is none."""
    value: Any = section
    for depth, part in enumerate(leaf):
        if value is None:
            return leaf  # `lora: null` wins, and is overridden by what is inside
        if not isinstance(value, dict):
            return leaf[:depth]
        if part not in value:
            return None
        value = value[part]
    return leaf


def value_at(settings: Any, path: KeyPath) -> Any:
    """The value at a path in nested settings; None if there is none."""
    for part in path:
        if isinstance(settings, dict):
            settings = settings.get(part)
        else:
            inside = isinstance(settings, list) and isinstance(part, int) and part < len(settings)
            settings = settings[part] if inside else None
    return settings


def _same(present: Any, value: Any) -> bool:
    return present == value or (isinstance(present, str) and isinstance(value, str) and present == absolute(value))


def _assignment(path: KeyPath, leaf: KeyPath, value: Any) -> str:
    """What to write on the command line to set a phase's own value at `path`, or inside it,
    where `leaf` has `value` for all phases."""
    for part in reversed(leaf[len(path) - 2 :] if path[-1] in leaf else ()):
        value = {part: value}
    return f"{dotted(path)}={_text(value)}"


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)
