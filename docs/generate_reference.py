"""Writes the reference pages: every setting, command, metric, event and environment variable, from the code.

    python -m docs.generate_reference docs/reference

The texts are those in the code: docstrings under fields, help texts of options, tables.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.spec import SPECS
from launcher.cli.common import GROUPS
from launcher.cli.main import app
from launcher.jobfile.job import NEUTRAL, TopLevel
from launcher.jobfile.phase_builder import SHARED
from launcher.jobfile.validation_messages import annotation_of, bare_of, describe, flow, keys_of, settings_classes
from launcher.process.exit_status import ExitStatus
from launcher.runfolder import event_schema
from training.config import Phase
from training.metric_schema import ALIASES, Columns
from training.recipes import RECIPES

REQUIRED = "required"
OF_THE_FILE = {"name": "the name of the file"}
OF_A_PHASE = {
    "recipe": "the name of the phase",
    "seed": "the seed of the job",
    "model": "the model of the job",
    "model.path": "required, unless the phase starts from another",
    "epochs": "1, unless `max_steps` is given",
}
"""Defaults that are not in the settings classes, since they depend on the rest of the file."""

ENVIRONMENT = {
    "CC": "The C compiler for `model.compile` and Liger's kernels on GPUs. Default: gcc or clang.",
    "CXX": "The C++ compiler for `model.compile` on CPUs. Default: g++.",
    "MUSTER_CACHE": "The cache folder, for example for tokenized data. Default: `~/.cache/muster`.",
    "MUSTER_HOME": "Folder of the records of clusters that are up, with their keys and tokens. Default: `~/.muster`.",
    "MUSTER_STORAGE_PATIENCE_S": "Seconds for which failed access to storage is retried. Default: 300.",
    "MUSTER_CLOUD": "The cloud whose preemption notices are watched: `aws`, `gcp`, `azure` or `none`. "
    "Default: as detected from the firmware.",
    "MUSTER_METADATA_URL": "Address of the metadata service with these notices. Default: the cloud's own address.",
    "RAY_ADDRESS": "The Ray cluster to run on, as `HOST:PORT`. Without it, `muster run` starts a private Ray cluster.",
    "RAY_AUTH_TOKEN": "The token of that cluster, or of a cluster with `provider: existing`.",
    "RAY_AUTH_TOKEN_PATH": "A file with that token. Default: `~/.ray/auth_token`, if it exists.",
    "RAY_USE_TLS": "A setting of Ray: whether that cluster uses TLS. Muster then checks only that the port "
    "is open, and Ray waits for the cluster.",
    "CUDA_VISIBLE_DEVICES": "Numbers of the GPUs of this machine that may be used. Default: all.",
    "NO_PROXY": "Hosts that are reached without a proxy. Muster adds the address of this machine, for tunnels.",
}
"""Environment variables that Muster reads. Those that it sets for itself are not listed."""

_ROOT = Path(__file__).resolve().parents[1]
TRIED = _ROOT / ".ci" / "tried.yaml"
"""The sets of versions that the tests have passed with. It is in the checkout only, where these pages are generated."""
OUR_PACKAGES = ("launcher", "training", "cluster")
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "peft", "datasets", "fsspec")
"""Those whose versions Muster bounds from above."""


@dataclass(frozen=True)
class Row:
    """One setting."""

    key: str
    takes: str
    default: str
    meaning: str


def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    made = {
        "job.md": _job(),
        "cluster.md": _clusters(),
        "commands.md": _commands(),
        "metrics.md": _metrics(),
        "modules.md": _modules(),
        "versions.md": _versions(yaml.safe_load(TRIED.read_text(encoding="utf-8"))),
    }
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


# Settings


def rows_of(
    model: type[BaseModel], filled_in: Mapping[str, str], prefix: str = "", given: BaseModel | None = None
) -> Iterator[Row]:
    """Every setting below a class, depth first. `given`: the default of the whole section, if it has one."""
    for name, field in keys_of(model).items():
        key = f"{prefix}{name}"
        attribute = next(attribute for attribute, own in model.model_fields.items() if own is field)
        value = getattr(given, attribute) if given is not None else field.default
        default = filled_in[key] if key in filled_in else _default(field, value)
        yield Row(key, _takes(field), default, _meaning(model, attribute))
        for inner, mark in _sections(field.annotation):
            whole = value if isinstance(value, inner) else None
            yield from rows_of(inner, filled_in, f"{key}{mark}.", whole)


def _takes(field: FieldInfo) -> str:
    return describe(annotation_of(field)).replace(str(2**63), "2^63")


def _meaning(model: type[BaseModel], attribute: str) -> str:
    """The string under the field, in the class that wrote one last."""
    for one in model.__mro__:
        if issubclass(one, BaseModel) and (field := one.model_fields.get(attribute)) and field.description:
            return re.sub(r"\bNone:", "null:", " ".join(field.description.split()))
    return ""


def _default(field: FieldInfo, value: Any) -> str:
    if field.is_required():
        return REQUIRED
    if isinstance(value, BaseModel):
        return ""
    return f"`{_written(value)}`"


def _written(value: Any) -> str:
    """As a job file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return flow(value)


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """The settings classes inside, with what stands behind the key: nothing, `[]` in a list, `.NAME` in a mapping."""
    for inner in settings_classes(annotation):
        yield inner, ""
    for option in (annotation, *get_args(annotation)):
        bare = bare_of(option)
        if get_origin(bare) in (list, dict):
            for inner in settings_classes(get_args(bare)[-1]):
                yield inner, "[]" if get_origin(bare) is list else ".NAME"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False) + "\n"


def _settings_table(rows: Iterable[Row]) -> Iterator[str]:
    yield from _table(
        ("key", "takes", "default", "meaning"), ((f"`{r.key}`", r.takes, r.default, r.meaning) for r in rows)
    )


def _by_section(rows: Sequence[Row]) -> Iterator[str]:
    """One table for the keys at the top, one for each section below them."""
    tables: dict[str, list[Row]] = {"": []}
    for row in rows:
        tables.setdefault(_top_of(row.key) if "." in row.key else "", []).append(row)
    for top, inside in tables.items():
        if top:
            yield f"### `{top}`\n"
        if inside:
            yield from _settings_table(inside)


def _top_of(key: str) -> str:
    return re.split(r"[.\[]", key)[0]


_HEAD = "This page is generated from the code by `make docs`. Corrections belong in the code.\n"


def _job() -> Iterator[str]:
    yield "# The job file: every setting\n"
    yield _HEAD
    yield "`null` means no value. `NAME` stands for a name of your choice, `[]` for each entry of a list. Any setting"
    yield "can be overridden on the command line by its path: `muster run job.yaml phases.NAME.learning_rate=1e-5`.\n"
    yield "## At the top\n"
    yield from _settings_table(rows_of(TopLevel, OF_THE_FILE))
    yield f"{_listed(SHARED)} apply to all phases. A phase may repeat them; its values take precedence, key by key.\n"
    yield "## Every phase\n"
    yield "These keys are in `phases.NAME`. Defaults that differ between recipes are listed with the recipe.\n"
    common = list(rows_of(Phase, OF_A_PHASE))
    own = {name: list(rows_of(recipe.config, OF_A_PHASE)) for name, recipe in RECIPES.items()}
    yield from _by_section([_with_recipes_defaults(row, own) for row in common])
    known = {row.key: row for row in common}
    for name, recipe in RECIPES.items():
        yield f"## The recipe `{name}`\n"
        yield f"{' '.join((recipe.config.__doc__ or '').split())}\n"
        yield from _by_section([row for row in own[name] if _is_other(row, known.get(row.key))])
    yield "## Settings that may change when a run is resumed\n"
    yield "A run is resumed only with the job that its checkpoints belong to. The following settings do not"
    yield "affect the loss curve, so they may differ. A change of any other setting needs `--accept-changes`.\n"
    yield from (f"- `{key.replace('*', 'NAME')}`" for key in NEUTRAL)
    yield ""
    yield "## Environment variables\n"
    yield from _table(("variable", "meaning"), ((f"`{name}`", meaning) for name, meaning in ENVIRONMENT.items()))
    yield "Workers on other machines receive the variables that begin with `HF_`, `NCCL_`, `MUSTER_`, `AWS_`, `GOOGLE_`"
    yield "or `FSSPEC_`, and those that the job names in `env`. Keys and addresses of Hugging Face, W&B, MLflow and"
    yield "storage are read by their own libraries (`HF_TOKEN`, `WANDB_API_KEY`, `MLFLOW_TRACKING_URI`, `AWS_PROFILE`,"
    yield "`AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`)."


def _is_other(row: Row, common: Row | None) -> bool:
    """Whether there is more to say of a recipe's setting than its default."""
    return common is None or (row.takes, row.meaning) != (common.takes, common.meaning)


def _with_recipes_defaults(row: Row, own: Mapping[str, Sequence[Row]]) -> Row:
    others: dict[str, list[str]] = {}
    for recipe, rows in own.items():
        default = next(each.default for each in rows if each.key == row.key)
        if default != row.default:
            others.setdefault(default, []).append(recipe)
    told = "".join(f"; {', '.join(recipes)}: {default}" for default, recipes in others.items())
    return replace(row, default=row.default + told)


def _listed(names: Iterable[str]) -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} and {last}"


def _clusters() -> Iterator[str]:
    yield "# The cluster file: every setting\n"
    yield _HEAD
    yield "`provider` says where the machines come from, and determines the other keys. `configs/clusters/` has"
    yield "complete examples in which only names need to be replaced. The keys of `custom` are the same for all"
    yield "providers and listed with the first.\n"
    for name, spec in SPECS.items():
        yield f"## `provider: {name}`\n"
        yield f"{' '.join((spec.__doc__ or '').split())}\n"
        rows = [
            replace(row, default=f"`{name}`") if row.key == "provider" else row for row in rows_of(spec, OF_THE_FILE)
        ]
        if name != next(iter(SPECS)):
            rows = [row for row in rows if not row.key.startswith("custom.")]
        yield from _by_section(rows)


# Commands


def _commands() -> Iterator[str]:
    yield "# Commands\n"
    yield _HEAD
    yield "## Exit statuses\n"
    yield from _table(("status", "meaning"), ((str(status.value), status.__doc__ or "") for status in ExitStatus))
    for heading, names in GROUPS.items():
        yield f"## {heading}\n"
        for words, command in verbs().items():
            if words.split()[0] in names:
                yield from _command(words, command)


def _command(words: str, command: Any) -> Iterator[str]:
    """The section of one command."""
    yield f"### `muster {words}`\n"
    yield f"{command.help}\n"
    arguments = [each for each in command.params if not each.opts[0].startswith("-")]
    options = [each for each in command.params if each.opts[0].startswith("-") and each.name != "help"]
    usage = [words, *map(_shown_argument, arguments), *(["[OPTIONS]"] if options else [])]
    yield _block([f"muster {' '.join(usage)}"])
    if arguments:
        yield from _table(("argument", "meaning"), ((f"`{_plain(each)}`", each.help or "") for each in arguments))
    if options:
        yield from _table(("option", "takes", "default", "meaning"), map(_option, options))
    yield "Examples:\n"
    yield _block(command.epilog.splitlines())


def _block(lines: Iterable[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def verbs() -> dict[str, Any]:
    """Every command, by the words that call it, in the order of the help."""
    found: dict[str, Any] = {}
    top: Any = typer.main.get_command(app)
    for name in top.list_commands(None):
        command = top.commands[name]
        for inner, verb in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = verb
    return found


def _plain(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _shown_argument(argument: Any) -> str:
    name = _plain(argument) if argument.required else f"[{_plain(argument)}]"
    return name if argument.nargs == 1 else f"{name}..."


def _option(option: Any) -> tuple[str, str, str, str]:
    if option.is_flag:
        takes, default = "", ""
    else:
        takes = option.metavar or _plain_type(option)
        given = option.default
        default = "required" if option.required else "" if given is None else f"`{given}`"
    return ", ".join(f"`{each}`" for each in option.opts), takes, default, option.help or ""


def _plain_type(option: Any) -> str:
    kinds: dict[Any, str] = {int: "whole number", float: "number", Path: "path"}
    if option.type_descriptor.choices:
        return " or ".join(option.type_descriptor.choices)
    annotation = option.type_descriptor.annotation
    word = next((kinds[kind] for kind in (annotation, *get_args(annotation)) if kind in kinds), "text")
    least = "" if option.min is None else f" >= {option.min}"
    most = "" if option.max is None else f" and <= {option.max}" if least else f" <= {option.max}"
    return f"{word}{least}{most}"


# Metrics and events


def _modules() -> Iterator[str]:
    yield "# Modules\n"
    yield _HEAD
    yield "Each module with its first line. [architecture.md](../architecture.md) explains how they work together.\n"
    for package in OUR_PACKAGES:
        for folder in sorted({file.parent for file in (_ROOT / package).rglob("*.py")}):
            name, files = folder.relative_to(_ROOT).as_posix(), sorted(folder.glob("[!_]*.py"))
            if not files:
                continue
            yield f"## `{name}/`\n"
            if said := _first_sentence(folder / "__init__.py"):
                yield f"{said}\n"
            yield "| module | |\n|---|---|"
            for file in files:
                yield f"| `{file.stem}` | {_first_sentence(file)} |"
            yield ""


def _first_sentence(file: Path) -> str:
    """The first line of a module's docstring as a table shows it; some lines wrap."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


def _metrics() -> Iterator[str]:
    yield "# Metrics and events\n"
    yield _HEAD
    yield "[metrics.md](../metrics.md) explains how to interpret them.\n"
    yield "## `metrics.jsonl`\n"
    yield "The folder of the phase has one object per step and one per evaluation. Each step occurs once, even if the"
    yield "run was interrupted.\n"
    told: dict[int, list[str]] = {}
    for name, recipe in RECIPES.items():
        told.setdefault(id(recipe.metrics), []).append(name)
    for recipes in told.values():
        yield f"### {', '.join(recipes)}\n"
        yield from _columns(RECIPES[recipes[0]].metrics)
    yield "### Old names\n"
    yield "Runs of versions before 0.2 have these names. This version reads them. It also writes them, in"
    yield "`metrics.jsonl`, to trackers and in the output of `--json`; later versions write only the current names.\n"
    yield from _table(("old name", "current name"), ((f"`{old}`", f"`{name}`") for old, name in ALIASES.items()))
    yield "## `events.jsonl`\n"
    yield "The folder of the run has one object per event.\n"
    yield from _table(
        ("key of every event", "meaning"), ((f"`{name}`", text) for name, text in event_schema.COMMON.items())
    )
    yield "Events of a phase also have `phase`, the name of the phase.\n"
    yield from _table(("event", "meaning", "keys"), (_event(name, each) for name, each in event_schema.EVENTS.items()))


def _columns(columns: Columns) -> Iterator[str]:
    rows = ((f"`{name}`", each.label, each.unit, each.meaning) for name, each in columns.items())
    yield from _table(("column", "label", "unit", "meaning"), rows)


def _event(name: str, event: event_schema.Event) -> tuple[str, str, str]:
    fields = " ".join(f"`{fact}`: {text}" for fact, text in event.fields.items())
    return f"`{name}`" + ("" if event.of_phase else " (of the run)"), event.meaning, fields


# Versions

_RESUMES = (
    (
        "the same set of versions",
        "At the same number of workers and the same ZeRO stage, the metrics and weights are bit for bit those of a "
        "run that was never interrupted. Otherwise they are equal to rounding.",
    ),
    (
        "another set of this table",
        "Weights, moments and the position in the data are restored exactly. Later metrics are equal to rounding as "
        "far as the packages compute the same; a release that changes a kernel, a model or a tokenizer may change "
        "them further.",
    ),
    (
        "versions that are not in this table",
        "Nothing is promised. pip refuses versions outside the bounds of `pyproject.toml`.",
    ),
)


def _versions(sets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "# Tested versions\n"
    yield "Generated from `.ci/tried.yaml` by `make docs`.\n"
    yield "All tests have passed with each of these sets of versions, oldest first.\n"
    rows = [_set(each, _age(i, len(sets))) for i, each in enumerate(sets)]
    yield from _table(("set", "tested since", "platform", "Python", *PACKAGES), rows)
    yield _paragraph(
        "`.ci/cpu.lock` pins the newest set with everything that it depends on. `.ci/cuda.lock` pins the same versions "
        "with CUDA's libraries; no test has run with it on a GPU yet. The next minor releases of these packages are "
        "excluded until they are tested."
    )
    yield "## What a resume across versions promises\n"
    yield _paragraph(
        "Checkpoints are in Muster's own format: safetensors and JSON, without pickled objects of torch or DeepSpeed. "
        "Muster 0.2 reads the job files, runs, checkpoints, token stores and cluster records of 0.1 "
        "(`tests/old_runs/`)."
    )
    across = "yes" if len(sets) > 1 else "no: there is one set so far"
    resumes = zip(_RESUMES, ("yes", across, "no"), strict=True)
    yield from _table(("resume with", "promise", "tested"), ((*row, tested) for row, tested in resumes))
    yield _paragraph(
        "All workers of a group must have the same versions: the preflight check refuses others. A resume with other "
        "versions than before is not refused. The event `started` in `events.jsonl` records the versions of every "
        "attempt, and every checkpoint's `manifest.json` those that it was written with. To reproduce a curve, resume "
        "with the recorded versions."
    )


def _age(index: int, count: int) -> str:
    """Of a set in the list, whose order is oldest first."""
    names = [name for name, at in (("oldest", 0), ("newest", count - 1)) if at == index]
    return " and ".join(names)


def _set(versions: Mapping[str, Any], age: str) -> tuple[str, ...]:
    return (age, str(versions["since"]), versions["platform"], versions["python"], *(versions[p] for p in PACKAGES))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
