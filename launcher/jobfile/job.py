"""The job file: from YAML text to a validated Job, with every error at once. Loads neither torch nor Ray.

    name, seed, storage, track          of the whole job
    model, resources, sharding,         for all phases; a phase may repeat them, and its values win key by key
    seed, deepspeed
    phases                              run in order; the key of a phase is its recipe unless it says `recipe:`

A phase after the first starts from the one before, or from the earlier one that it names with `from:`; its weights come
from there, so only a phase without a predecessor needs `model.path`.

A relative path in a job file is relative to the folder of that file (data, model and tokenizer folders, template,
storage, DeepSpeed's JSON). On the command line it is relative to the current folder, where the shell completes it. A
model, tokenizer or data set name that is no such path is a name on the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator

from launcher.jobfile import shared_settings, yaml_with_lines
from launcher.jobfile.other_tools import name_here
from launcher.jobfile.overrides import overlaid
from launcher.jobfile.phase_builder import SHARED, base_folder, origin, phases_of
from launcher.jobfile.problem_collector import ProblemCollector
from launcher.jobfile.resolved import RESOLVED
from launcher.jobfile.shared_settings import OwnSettings
from launcher.jobfile.validation_messages import (
    REQUIRED,
    UNKNOWN_KEY,
    all_keys,
    did_you_mean,
    keys_of,
    listed,
    validated,
)
from launcher.jobfile.yaml_with_lines import Document, KeyPath, dotted
from launcher.process.terminal import printable
from training import model_folder
from training.config import Model, Phase, Resources, Settings, Sharding, Source
from training.data import files, templates
from training.errors import InputError, Problem
from training.estimate.parameters import holes
from training.io.paths import absolute
from training.recipes import RECIPES
from training.storage import is_remote, open_storage

NEUTRAL = (
    "storage",
    "env",
    "track",
    "max_hours",
    "max_cost",
    "checkpoint_quota",
    "phases.*.resources",
    "phases.*.sharding",
    "phases.*.micro_tokens",
    "phases.*.micro_batch",
    "phases.*.generation_batch",
    "phases.*.log_every",
    "phases.*.profile",
    "phases.*.eval_on_start",
    "phases.*.on_divergence",
    "phases.*.loss_limit",
    "phases.*.checkpoint",
    "phases.*.data.pack",
    "phases.*.data.bos",  # where it gives other tokens, the hash of the data says so
    "phases.*.model.attention",
    "phases.*.model.gradient_checkpointing",
    "phases.*.model.kernels",
    "phases.*.model.compile",
    "phases.*.reward.*.folder",
)
"""What does not change the loss curve: a run may go on with other values of these, and it is still the same job."""

ADDED: dict[str, Any] = {
    "phases.*.data.bad_rows": "refuse",
    "phases.*.data.train.*.revision": None,
    "phases.*.data.eval.*.revision": None,
    "phases.*.model.revision": None,
    "phases.*.model.tokenizer_revision": None,
    "phases.*.data.turns": "auto",
    "phases.*.model.resize_embedding": "never",
}
"""Settings that came after the first runs, with the value at which a job means what it meant before there was such a
setting: there they are no part of its hash, so older runs go on. `*` stands for any phase, or any entry of a list."""

ENV_NAMES = "MUSTER_ENV"
"""The environment variable with the names, separated by spaces, of those that a job's `env` asks for."""

Section = dict[str, Any]
Found = TypeVar("Found")
Tracker = Literal["tensorboard", "wandb", "mlflow"]
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A validated job: every phase complete, every local path absolute."""

    name: str
    """Name of the run's folder."""
    file: Path = field(compare=False)
    """The job file as the user gave it."""
    storage: str
    """Folder of the runs: an absolute path, or an address in a bucket."""
    seed: int
    track: list[str]
    """Where metrics go beside metrics.jsonl."""
    env: list[str]
    """Names of environment variables that workers, and clusters that the job is submitted to, are given."""
    max_hours: float | None = None
    """With workers, over all attempts: then the run saves and stops."""
    max_cost: float | None = None
    """Of the machines that its workers are on, and the head: as `max_hours`. Needs prices in the cluster file."""
    checkpoint_quota: str | None = None
    """What all checkpoints of the run may take, with its unit."""
    phases: dict[str, Phase]
    """By name, in the order in which they run."""
    document: Document = field(compare=False, repr=False)
    """Where every setting was written."""
    own_settings: OwnSettings = field(default_factory=dict, repr=False)
    """By phase: the settings of `model`, `resources`, `sharding`, `seed` and `deepspeed`
    that the user's file gives inside the phase."""

    @property
    def quota_bytes(self) -> int | None:
        return None if self.checkpoint_quota is None else _bytes_of(self.checkpoint_quota)

    @property
    def accelerator(self) -> str | None:
        """The type of GPU that all phases ask for; None if they ask for none, or not for the same."""
        kinds = {phase.resources.accelerator for phase in self.phases.values()}
        return kinds.pop() if len(kinds) == 1 else None

    def look_at_phases(self, look: Callable[[Phase], Found]) -> dict[str, Found]:
        """What `look` finds, by phase. Raises InputError with what it told of any of them, settings with their line."""
        found: dict[str, Found] = {}
        problems: list[Problem] = []
        for name, phase in self.phases.items():
            try:
                found[name] = look(phase)
            except InputError as error:
                told = [self._located(name, problem) for problem in error.problems]
                problems += [problem for problem in told if problem not in problems]
        if problems:
            raise InputError(problems)
        return found

    def _located(self, phase: str, problem: Problem) -> Problem:
        """A setting that is wrong, named as it is written; anything else as it is."""
        if problem.where or not problem.what:
            return problem
        path = origin(self.document.data, ("phases", phase, *problem.what.split(".")))
        return Problem(self.document.where(path), dotted(path), problem.message)


_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(MB|GB|TB|MiB|GiB|TiB)")
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _bytes_of(text: str) -> int:
    """Of a size such as 200GB. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size == 0:
        raise ValueError(f'got "{text}", expected a size such as 200GB, 1.5TB or 64GiB')
    return size


class TopLevel(Settings):
    """The top level of a job file. The contents of the sections are validated where they are used."""

    name: str | None = None
    """Name of the run's folder in `storage`: letters, digits and . _ -, at most 100 characters. None: the name of the
    job file."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Root seed of all random choices."""
    storage: str = "runs"
    """Where runs are stored: a folder that all machines share, or a bucket (`s3://BUCKET/FOLDER`, `gs://...`)."""
    track: Tracker | list[Tracker] = Field(default=["tensorboard"])
    """Trackers that metrics are sent to in addition to metrics.jsonl: one, or a list. An empty list: none."""
    env: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = Field(default=[], examples=["[HF_TOKEN]"])
    """Names of environment variables, such as API keys, that are passed to workers and clusters. Their values are never
    written to a file."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours with workers, over all attempts, after which the run saves a checkpoint and stops (exit status 3). None: no
    limit."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """The same limit for the price of the machines, in the currency of the prices in the cluster file, which it
    requires. None: no limit."""
    checkpoint_quota: str | None = None
    """Maximum size of the checkpoints of all phases together, such as 200GB (MB, GB, TB, MiB, GiB, TiB), including one
    that is being written. Before a checkpoint is written, the oldest are deleted as needed, even if `checkpoint.keep`
    would keep them; never deleted are the newest from which the run can be resumed, the best, and the final one of a
    phase. None: no limit."""
    model: Section = Field(default={})
    """Settings for all phases; see below."""
    resources: Section = Field(default={})
    """Settings for all phases; see below."""
    sharding: Section = Field(default={})
    """Settings for all phases; see below."""
    deepspeed: str | Section = Field(default={})
    """Raw DeepSpeed settings for all phases: a mapping or a JSON file. Settings that Muster controls are refused."""
    resolved: dict[str, list[str]] | None = None
    """Written by Muster into a run's job.yaml, where every phase is complete: for each phase, the settings that your
    file gave inside it. Values at the top level, in this file or on the command line, replace all other values."""
    phases: Annotated[dict[str, Section], Field(min_length=1)] = Field(
        examples=["{sft: {data: {train: data/train.jsonl}}}"]
    )
    """The phases, in order, under names of your choice: letters, digits, _ and -."""

    @field_validator("checkpoint_quota", mode="before")
    @classmethod
    def _is_a_size(cls, quota: object) -> object:
        if quota is not None:
            _bytes_of(str(quota))  # a number without a unit gets the same words as any other text
        return quota


def load(file: Path, overrides: Sequence[str] = (), elsewhere: Sequence[str] = ()) -> Job:
    """The job in a file, with `key=value` overrides, checked against this machine: the data and model files that it
    names, except below the folders `elsewhere`, and the environment variables.

    Raises InputError with every problem. Data rows are not read; hub names are not looked up.
    """
    job, report, document = _read(file, overrides)
    for path, message in (*_missing_variables(job), *_missing_files(job, elsewhere)):
        report.add(origin(document.data, path), message)
    report.raise_any()
    return job


def read(file: Path, overrides: Sequence[str] = ()) -> Job:
    """As `load`, without looking at data and model files: for a run whose inputs may have moved since."""
    return _read(file, overrides)[0]


def dump(job: Job) -> str:
    """The job as YAML, as resolved: absolute paths, complete phases. `read` of it gives an equal Job."""
    data = _as_data(job)
    phases = data.pop("phases")
    own = {name: job.own_settings.get(name, []) for name in phases}
    return yaml_with_lines.dump({**data, RESOLVED: own, "phases": phases})


def differences(old: Job, new: Job) -> list[str]:
    """What makes `new` another job than `old`: `phases.sft.learning_rate: 1e-05 -> 2e-05`.
    Empty if they are the same."""
    before, after = _meaning(old), _meaning(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    shared_phases = {f"phases.{name}" for name in old.phases.keys() & new.phases.keys()}
    told = [key for key in keys if not key.startswith("phases.") or ".".join(key.split(".")[:2]) in shared_phases]
    return [f"{key}: {_compact(before, key)} -> {_compact(after, key)}" for key in told]


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key: {"checkpoint.every": 200}."""
    return {dotted(path): value for path, value in _leaves(settings)}


def job_hash(job: Job, *, as_written: bool = False) -> str:
    """16 hexadecimal digits; equal for two jobs without `differences`.

    `as_written`: 3 warm-up steps and 3.0 are two things, as in checkpoints of older versions.
    """
    text = json.dumps(_meaning(job, as_written=as_written), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# From a document to a Job


def _read(file: Path, overrides: Sequence[str]) -> tuple[Job, ProblemCollector, Document]:
    written = yaml_with_lines.load(file)
    document, overridden, override_problems = overlaid(written, overrides)
    own = shared_settings.own_settings(written)
    shared_settings.inherit_from_top(document, overridden, own)
    report = ProblemCollector(document)
    for problem in override_problems:
        report.add_command_line(problem)
    for path, message in shared_settings.unknown_phases(document):
        report.add(path, message)
    names = document.data.get("phases")
    top = validated(TopLevel, document.data, lambda path, message: report.add(path, _redirected(path, message, names)))
    name = _name(document, file, report)
    _check_shared(document.data, report)
    phases = phases_of(document, file, report)
    for path, message in shared_settings.unknown_to_deepspeed(document, phases):
        report.add(origin(document.data, path), message)
    base = base_folder(document, ("storage",), file)
    if top is not None and (wrong := _storage_problem(top.storage, base)):
        report.add(("storage",), wrong)
    report.raise_any()
    assert top is not None, "its problems were raised"
    effects = shared_settings.effects(written, document, overridden, phases)
    for path, message in effects.problems:
        report.add(path, message)
    report.raise_any()
    for note in effects.notes:
        print(printable(note), file=sys.stderr)
    track: list[str] = [top.track] if isinstance(top.track, str) else [*dict.fromkeys(top.track)]
    storage = top.storage.rstrip("/") if is_remote(top.storage) else absolute(top.storage, base)
    job = Job(
        name=name, file=file, storage=storage, seed=top.seed, track=track, env=top.env, max_hours=top.max_hours,
        max_cost=top.max_cost, checkpoint_quota=top.checkpoint_quota, phases=phases, document=document,
        own_settings=own,
    )  # fmt: skip
    return job, report, document


def _storage_problem(storage: str, base: Path) -> str | None:
    if not is_remote(storage):
        path = Path(absolute(storage, base))
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        return None if there.is_dir() else f"{there} is a file; name a folder"
    if not storage.partition("://")[2].strip("/"):
        return f"{storage} names no bucket; write s3://BUCKET/FOLDER"
    try:
        open_storage(storage)
    except InputError as error:
        return str(error)
    return None


def _redirected(path: KeyPath, message: str, phases: Any) -> str:
    """The message about the top level; a key that has its place in a phase or a section is told which."""
    key = str(path[-1])
    if path[:-1] == ("phases",) and name_here(key):
        return f"{message}; {name_here(key)}"
    if not message.startswith(UNKNOWN_KEY) or name_here(key):
        return message
    if isinstance(phases, dict) and key in phases:
        return f"{UNKNOWN_KEY}; did you mean phases.{key}?"
    if any(key in keys_of(recipe.config) for recipe in RECIPES.values()):
        return f"this key belongs in a phase: phases.NAME.{key}"
    meant = settings_named(key)
    return f"{UNKNOWN_KEY}; did you mean {listed(meant)}?" if meant else message


def settings_named(key: str) -> list[str]:
    """The paths of all settings of a job that end with a key, as they are given for all phases where that can be."""
    inside = {path for recipe in RECIPES.values() for path in all_keys(recipe.config) if path[-1] == key}
    top = [key] if key in TopLevel.model_fields else []
    return sorted({*top, *(dotted(path if path[0] in SHARED else ("phases", "NAME", *path)) for path in inside)})


def _name(document: Document, file: Path, report: ProblemCollector) -> str:
    given = document.data.get("name")
    name = given if isinstance(given, str) else file.stem
    if not _SAFE_NAME.fullmatch(name):
        source = "" if given is not None else " (the file's own name)"
        rule = "letters, digits and . _ - alone, beginning with a letter or digit, at most 100"
        report.add(("name",), f"{json.dumps(name, ensure_ascii=False)}{source} cannot name a folder; use {rule}")
    return name


def _check_shared(data: dict[str, Any], report: ProblemCollector) -> None:
    """Problems inside the top-level sections, also where no phase comes to use them. Phases may add what is missing."""
    sections: dict[str, type[Settings]] = {"model": Model, "resources": Resources, "sharding": Sharding}
    for key, model in sections.items():

        def add(path: KeyPath, message: str, key: str = key) -> None:
            if not message.startswith(REQUIRED):
                report.add((key, *path), message)

        if isinstance(data.get(key), dict):
            validated(model, data[key], add)


def _missing_variables(job: Job) -> Iterator[tuple[KeyPath, str]]:
    for index, name in enumerate(job.env):
        if name not in os.environ:
            yield ("env", index), f"{name} is not set in the environment; `export {name}=...`, or leave it out"


def _missing_files(job: Job, elsewhere: Sequence[str]) -> Iterator[tuple[KeyPath, str]]:
    """What the phases name and the disk does not have, or has broken."""

    def away(path: Any) -> bool:
        return isinstance(path, str) and any(Path(path).is_relative_to(folder) for folder in elsewhere)

    for name, phase in job.phases.items():
        prefix: KeyPath = ("phases", name)
        data = phase.data
        for key, source in (("train", data.train), ("eval", data.eval)):
            split = "train" if key == "train" else ""
            found = _source_problems(source, job.file.parent, phase, away, split) if source is not None else ()
            for inner, message in found:
                yield (*prefix, "data", key, *inner), message
        for key in ("data", "verdicts") if phase.eval is not None else ():
            asked = getattr(phase.eval, key)
            for _, message in _source_problems(asked, job.file.parent, phase, away) if asked is not None else ():
                yield (*prefix, "eval", key), message
        if not away(data.template) and (problem := _template_problem(data.template)):
            yield (*prefix, "data", "template"), problem
        if not phase.starts_from_phase and os.path.isabs(phase.model.path) and not away(phase.model.path):
            where: KeyPath = ("model", "path") if phase.from_ is None else ("from",)
            problems = _model_problems(phase)
            for problem in problems:
                yield (*prefix, *where), problem
            for problem in model_folder.unmatched_targets(phase.model) if not problems else ():
                yield (*prefix, "model", "lora", "targets"), problem
        for key, path in _judging_models(phase):
            for message in _folder_problems(path) if not away(path) else ():
                yield (*prefix, key), message
        tokenizer = phase.model.tokenizer
        if (
            tokenizer
            and os.path.isabs(tokenizer)
            and not away(tokenizer)
            and not model_folder.has_tokenizer(Path(tokenizer))
        ):
            yield (
                (*prefix, "model", "tokenizer"),
                f"no tokenizer files (tokenizer.json or tokenizer.model) in {tokenizer}",
            )


def _source_problems(
    source: Any, folder: Path, phase: Phase, away: Callable[[Any], bool], split: str = ""
) -> Iterator[tuple[KeyPath, str]]:
    entries = source if isinstance(source, list) else [source]
    here = [entry for entry in entries if not away(entry.path if isinstance(entry, Source) else entry)]
    if len(here) < len(entries):
        source = here  # of the others nothing can be said
    try:
        files.expand(source, folder, what="", documents=RECIPES[phase.recipe].reads_documents, split=split)
    except InputError as error:
        for problem in error.problems:
            index = re.fullmatch(r"\[(\d+)\]", problem.what)  # of the list's entry
            yield (int(index[1]),) if index else (), problem.message


def _template_problem(template: str) -> str | None:
    if os.path.isabs(template):
        return None if os.path.isfile(template) else f"no such file: {template}"
    names = (*templates.SETTINGS, *templates.TEMPLATES)
    if template in names:
        return None
    return f"no template {template}; there are {', '.join(names)}, or name a Jinja file{did_you_mean(template, names)}"


def _judging_models(phase: Phase) -> Iterator[tuple[str, str]]:
    """Folders of reward models, and of what the critic starts from."""
    named = [("reward", source.path) for source in phase.rewards if source.is_model]
    for key, path in [*named, *phase.named_models.items()]:
        if os.path.isabs(path):
            yield key, path


def _folder_problems(path: str) -> list[str]:
    """What keeps a folder from being loaded as a classifier, or with a scalar head in place of the one for tokens."""
    try:
        model_folder.inspect(Path(path), tokenizer_elsewhere=True, check_code=False, classifier=True)
    except InputError as error:
        return [str(problem) for problem in error.problems]
    return []


def _model_problems(phase: Phase) -> list[str]:
    model = phase.model
    try:
        model_folder.inspect(
            Path(model.path),
            tokenizer_elsewhere=model.tokenizer is not None,
            trust_remote_code=model.trust_remote_code,
            classifier=(classifier := RECIPES[phase.recipe].is_classifier),
        )
        model_folder.check_continues(model)
    except InputError as error:
        return [str(problem) for problem in error.problems]
    base = model_folder.base_of(model.path)
    quantized = model_folder.untrainable(model)
    problems = [quantized] if quantized else holes(Path(base), classifier=classifier)
    return [f"{base}: {problem}" for problem in problems]


# A Job as plain data


def _as_data(job: Job) -> dict[str, Any]:
    phases = {name: phase.model_dump(by_alias=True) for name, phase in job.phases.items()}
    top = {"name": job.name, "seed": job.seed, "storage": job.storage, "track": job.track, "env": job.env}
    limits = {"max_hours": job.max_hours, "max_cost": job.max_cost, "checkpoint_quota": job.checkpoint_quota}
    return {**top, **{name: limit for name, limit in limits.items() if limit is not None}, "phases": phases}


def _meaning(job: Job, *, as_written: bool = False) -> dict[str, Any]:
    """All that decides the loss curve, flat: {"phases.sft.batch": 64}; `phases` alone is their order."""
    leaves = {dotted(path): value for path, value in _leaves(_without_added(_as_data(job))) if not _is_neutral(path)}
    for name in job.phases:
        key = f"phases.{name}.schedule.warmup"
        if not as_written and float(leaves[key]).is_integer():
            leaves[key] = int(leaves[key])
    return leaves | {"phases": list(job.phases)}


def _without_added(value: Any, path: KeyPath = ()) -> Any:
    """The same data without neutral settings, and without those of ADDED that change nothing."""
    if isinstance(value, list):
        return [_without_added(entry, (*path, "*")) for entry in value]
    if not isinstance(value, dict):
        return value
    inner = {key: (_general((*path, key)), _without_added(entry, (*path, key))) for key, entry in value.items()}
    return {key: entry for key, (name, entry) in inner.items() if not _says_nothing(name, entry)}


def _says_nothing(name: str, value: Any) -> bool:
    return name in NEUTRAL or (name in ADDED and value == ADDED[name])


def _general(path: KeyPath) -> str:
    """The setting that a path is of, whatever its phase is called."""
    return dotted(("phases", "*", *path[2:]) if path[0] == "phases" and len(path) > 1 else path)


def _leaves(data: dict[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _is_neutral(path: KeyPath) -> bool:
    return any(f"{_general(path)}.".startswith(f"{neutral}.") for neutral in NEUTRAL)


def _compact(leaves: dict[str, Any], key: str) -> str:
    value = leaves.get(key, "not set")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
