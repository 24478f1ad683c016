"""One phase of a job file: from its section, and what it inherits, to complete settings with absolute paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.jobfile import raw_deepspeed as rawdeepspeed
from launcher.jobfile import yaml_with_lines
from launcher.jobfile.problem_collector import ProblemCollector
from launcher.jobfile.resolved import is_resolved
from launcher.jobfile.validation_messages import UNKNOWN_KEY, did_you_mean, validated
from launcher.jobfile.yaml_with_lines import COMMAND_LINE, Document, KeyPath, dotted
from training.config import Data, Model, Phase, Questions, RewardSource, Source
from training.data import files
from training.errors import InputError
from training.io.paths import absolute
from training.model_folder import ADAPTER_CONFIG, on_hub
from training.recipes import RECIPES
from training.storage import is_remote

SHARED = ("model", "resources", "sharding", "seed", "deepspeed")
"""Keys that hold for all phases when they stand at the top of the job."""

_PHASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # no dot: it separates keys on the command line
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def phases_of(document: Document, file: Path, report: ProblemCollector) -> dict[str, Phase]:
    """The phases that are valid; what is wrong with the others is in the report."""
    phases: dict[str, Phase] = {}
    names: list[str] = []
    given = document.data.get("phases")
    for name, own in given.items() if isinstance(given, dict) else ():
        if isinstance(own, dict):
            phase = _Drafting(document, file, report, name, own, names).phase(phases)
            phases |= {name: phase} if phase is not None else {}
        names.append(name)
    return phases


@dataclass
class _Drafting:
    """One phase on its way from what the file says to complete settings."""

    document: Document
    file: Path
    report: ProblemCollector
    name: str
    own: dict[str, Any]
    earlier: list[str]
    """Names of the phases before this one."""
    start_unknown: bool = False
    """`from` names nothing that there is: that was told."""

    def phase(self, valid: dict[str, Phase]) -> Phase | None:
        if not _PHASE_NAME.fullmatch(self.name):
            self.add((), "a phase's name has letters, digits, _ and - alone and begins with a letter or digit")
        draft = self.own
        for key in SHARED:
            if key in self.document.data:
                draft = draft | {key: _merged(self.document.data[key], self.own.get(key, {}), key in self.own)}
        draft = {"recipe": self.name} | draft | self.raw_deepspeed() | self.start(draft)
        if draft.get("epochs") is None and draft.get("max_steps") is None:
            draft["epochs"] = 1
        phase = validated(self.settings_class(), draft, self.add_unless_known)
        anchored = phase and self.anchored(phase, valid)
        return anchored if self.recipe in RECIPES else None

    def add(self, path: KeyPath, message: str) -> None:
        self.report.add(origin(self.document.data, ("phases", self.name, *path)), message)

    def add_unless_known(self, path: KeyPath, message: str) -> None:
        """Leaves out what was told before: wrong top-level values, and keys that an unknown recipe may well have."""
        told_at_top = len(origin(self.document.data, ("phases", self.name, *path))) == 1
        of_unknown_recipe = len(path) == 1 and message.startswith(UNKNOWN_KEY) and self.recipe not in RECIPES
        if not (told_at_top or of_unknown_recipe):
            self.add(path, message)

    @property
    def recipe(self) -> str:
        return str(self.own.get("recipe", self.name))

    def settings_class(self) -> type[Phase]:
        """The recipe's; what all recipes have in common if there is no such recipe."""
        if self.recipe in RECIPES:
            return RECIPES[self.recipe].config
        meant = did_you_mean(self.recipe, RECIPES) or f"; recipes: {', '.join(RECIPES)}"
        self.add(("recipe",), f'there is no recipe "{self.recipe}"{meant}')
        return Phase

    def start(self, draft: dict[str, Any]) -> dict[str, Any]:
        """`from` filled in and, where there is a predecessor, a `model.path` that `anchored` replaces."""
        given = draft.get("from")
        if isinstance(given, str) and given not in self.earlier:
            outside = self.outside(given)
            if outside is not None:
                return {"from": outside, "model": {"path": outside, **_of(draft, "model")}}
            self.add(("from",), self.no_such_start(given))
            self.start_unknown = True
        if not self.earlier or not isinstance(draft.get("model", {}), dict):
            return {}
        start = given if given in self.earlier or not isinstance(given, str | None) else self.earlier[-1]
        return {"from": start, "model": {"path": "", **draft.get("model", {})}}

    def outside(self, given: str, key: KeyPath = ("from",)) -> str | None:
        """The model folder that `from` means if it means a folder, or a run, or RUN/PHASE.
        None: there is no such thing."""
        if is_remote(given):
            return given.rstrip("/")
        folder = absolute(given, self.base(key))
        if _is_model(folder) or os.path.isabs(given):
            return self.model_of_run(folder, key=key) if os.path.exists(os.path.join(folder, "job.yaml")) else folder
        storage = str(self.document.data.get("storage", "runs"))
        runs = (
            absolute(storage, base_folder(self.document, ("storage",), self.file)) if not is_remote(storage) else None
        )
        run, _, phase = given.partition("/")
        for run_folder, wanted in ((folder, ""), (f"{runs}/{run}", phase)):
            if runs is not None and os.path.exists(os.path.join(run_folder, "job.yaml")):
                return self.model_of_run(run_folder, wanted, key)
        return None

    def model_of_run(self, folder: str, phase: str = "", key: KeyPath = ("from",)) -> str:
        """The model of a run's phase, of the last one unless it is named."""
        phases = _phases_in(Path(folder) / "job.yaml")
        name = phase or (phases[-1] if phases else "")
        model = os.path.join(folder, name, "model")
        if name not in phases:
            self.add(
                key,
                f"the run {folder} has no phase {name}{did_you_mean(name, phases)}; it has {', '.join(phases)}",
            )
        elif not _is_model(model):
            self.add(key, f"the phase {name} of the run {folder} is not finished: there is no {model}")
        return model

    def no_such_start(self, given: str) -> str:
        if not self.earlier:
            known = "no model folder and no run in the storage"
            if given in self.document.data["phases"]:
                known = "no phase before this one"
            return f'"{given}" is {known}; name a folder or a finished run, or remove `from` and set model.path'
        later = " comes later" if given in self.document.data["phases"] else " is no phase of this job"
        meant = did_you_mean(given, self.earlier) or f"; phases before this one: {', '.join(self.earlier)}"
        return f'"{given}"{later}{meant}'

    def raw_deepspeed(self) -> dict[str, Any]:
        """`deepspeed` as one mapping, the job's overlaid with the phase's own."""
        top = self.deepspeed_section(self.document.data.get("deepspeed", {}), ("deepspeed",))
        own = self.deepspeed_section(self.own.get("deepspeed", {}), ("phases", self.name, "deepspeed"))
        return {"deepspeed": _merged(top, own, "deepspeed" in self.own)}

    def deepspeed_section(self, given: Any, path: KeyPath) -> Any:
        settings, inside = given, ""
        if isinstance(given, str):
            settings, unreadable = rawdeepspeed.read(Path(absolute(given, base_folder(self.document, path, self.file))))
            inside = f"{given}: "
            if unreadable:
                self.report.add(path, unreadable)
        for key, message in rawdeepspeed.clashes(settings) if isinstance(settings, dict) else ():
            if inside:
                self.report.add(path, f"{inside}{dotted(key)}: {message}")
            else:
                self.report.add((*path, *key), message)
        return settings

    def anchored(self, phase: Phase, valid: dict[str, Phase]) -> Phase:
        """The phase with absolute paths, and the model path of the phase that it starts from."""
        model = phase.model
        update: dict[str, Any] = {"path": self.start_path(phase, valid)}
        if phase.from_ in valid and valid[phase.from_].model.resize_embedding == "auto":
            update["resize_embedding"] = "auto"  # the embedding is as that phase leaves it
        if model.tokenizer is not None:
            update["tokenizer"] = self.model_path(("model", "tokenizer"), model.tokenizer)
        update["revision"] = self.revision(phase, update["path"], valid)
        self.check_tokenizer_revision(model, update.get("tokenizer"))
        anchored = phase.model_copy(
            update={
                "model": model.model_copy(update=update),
                "data": self.anchored_data(phase.data),
                "eval": phase.eval and self.anchored_questions(phase.eval),
            }
        )
        return self.with_anchored_models(anchored, valid)

    def with_anchored_models(self, phase: Phase, valid: dict[str, Phase]) -> Phase:
        """The phase with absolute paths of rewards and named models; phases of this job keep their names."""
        rewards = []
        for where, source in zip(phase.reward_keys, phase.rewards, strict=True):
            update = {"path": self.reward_path(where, source, valid), "folder": self.reward_folder(where, source)}
            rewards.append(source.model_copy(update=update))
        named = {key: self.model_named((key,), path, valid) for key, path in phase.named_models.items()}
        return phase.with_models(named, rewards)

    def reward_path(self, where: KeyPath, source: RewardSource, valid: dict[str, Phase]) -> str:
        if source.is_model:
            path = self.model_named(where, source.path, valid)
            if path in valid and not RECIPES[valid[path].recipe].is_classifier:
                self.add(
                    where,
                    f"`{path}` ends with a language model, not with a reward model; name a phase of the recipe reward",
                )
            return path
        file, _, name = source.path.rpartition(":")
        if source.is_endpoint or not file.endswith(".py"):
            return source.path
        file = absolute(file, self.base(where))
        if not os.path.isfile(file):
            self.add(where, f"there is no file {file}")
        return f"{file}:{name}"

    def reward_folder(self, where: KeyPath, source: RewardSource) -> str | None:
        """Where the modules of a reward function are looked for, beside what is installed."""
        if not source.is_function:
            if source.folder is not None:
                self.add(where, f"`folder` has no effect: {source.path} is no Python function; remove it")
            return None
        if source.folder is None and is_resolved(self.document):
            return str(Path.cwd())  # a run that began before folders were recorded found its modules there
        return absolute(source.folder or ".", self.base(where))

    def model_named(self, where: KeyPath, given: str, valid: dict[str, Phase]) -> str:
        """The name of an earlier phase, or the model folder that a folder or a run has."""
        if given in self.earlier:
            return given
        found = self.outside(given, where)
        if found is None:
            later = (
                " comes later"
                if given in self.document.data["phases"]
                else " is no phase of this job, no run and no model folder"
            )
            meant = (
                did_you_mean(given, self.earlier) or f"; phases before this one: {', '.join(self.earlier) or 'none'}"
            )
            self.add(where, f'"{given}"{later}{meant}')
        return found or given

    def anchored_questions(self, asked: Questions) -> Questions:
        update = {"data": self.sources(("eval", "data"), asked.data)}
        if asked.verdicts is not None:
            update["verdicts"] = self.sources(("eval", "verdicts"), asked.verdicts)
        return asked.model_copy(update=update)

    def start_path(self, phase: Phase, valid: dict[str, Phase]) -> str:
        """The weights that the phase starts from; of an earlier phase those that this one started from."""
        if phase.from_ is None:
            return self.model_path(("model", "path"), phase.model.path)
        if not phase.starts_from_phase:
            if _of(self.own, "model").get("path") not in (None, phase.from_):
                self.add(("model", "path"), f"this phase starts from {phase.from_}; remove model.path here")
            return phase.from_
        start = valid.get(phase.from_)
        if start is None:
            return ""  # it has problems of its own
        if not self.start_unknown:
            self.check_start(phase, start)
        own_model = self.own.get("model", {})
        if "path" in own_model and self.model_path(("model", "path"), own_model["path"]) != start.model.path:
            self.add(
                ("model", "path"), f"this phase starts from the weights of `{phase.from_}`; remove model.path here"
            )
        return start.model.path

    def revision(self, phase: Phase, path: str, valid: dict[str, Phase]) -> str | None:
        """Branch, tag or commit of the model on the hub; of an earlier phase that of the one that it started from."""
        given = phase.model.revision
        if phase.starts_from_phase and (start := valid.get(phase.from_ or "")) is not None:
            if given not in (None, start.model.revision):
                self.add(
                    ("model", "revision"), f"this phase starts from the weights of `{phase.from_}`; remove it here"
                )
            return start.model.revision
        if given is None or not path or on_hub(path):
            return given
        if phase.from_ is None or "revision" in _of(self.own, "model"):
            self.add(("model", "revision"), f"has no effect: {path} is no model on the Hugging Face hub; remove it")
        return None

    def check_tokenizer_revision(self, model: Model, tokenizer: str | None) -> None:
        if model.tokenizer_revision is None or (tokenizer is not None and on_hub(tokenizer)):
            return
        why = "model.tokenizer is not set" if tokenizer is None else f"{tokenizer} is not on the Hugging Face hub"
        self.add(("model", "tokenizer_revision"), f"has no effect: {why}; remove it")

    def check_start(self, phase: Phase, start: Phase) -> None:
        """Problems of starting from what another phase ends with."""
        if self.recipe in RECIPES and RECIPES[start.recipe].is_classifier and not RECIPES[self.recipe].is_classifier:
            message = (
                f"`{phase.from_}` ends with a reward model, {phase.recipe} needs a language model; start from another "
                "phase"
            )
            self.add(("from",), message)
        before, here = start.model.lora, phase.model.lora
        if before is not None and here is not None and (before.rank, before.alpha) != (here.rank, here.alpha):
            message = (
                f"`{phase.from_}` ends with an adapter of rank {before.rank} and alpha {before.alpha:g}, which is "
                "trained on here; say the same"
            )
            self.add(("model", "lora"), message)

    def model_path(self, path: KeyPath, given: str) -> str:
        base = self.base(path)
        if _says_local(given) or (given and os.path.exists(base / given)):
            return absolute(given, base)
        if not _HUB_ID.fullmatch(given):
            if _HUB_ID.fullmatch(given.partition("/")[0]):
                return absolute(given, base)  # `models/a/b`: a folder, which will be found missing
            self.add(path, f'"{given}" is neither a folder nor a name on the Hugging Face hub (owner/name)')
        return given

    def anchored_data(self, data: Data) -> Data:
        train = self.sources(("data", "train"), data.train)
        held_out = None if data.eval is None else self.sources(("data", "eval"), data.eval)
        template = data.template
        base = self.base(("data", "template"))
        if "/" in template or template.endswith((".jinja", ".j2")) or os.path.isfile(base / template):
            template = absolute(template, base)
        return data.model_copy(update={"train": train, "eval": held_out, "template": template})

    def sources(self, path: KeyPath, given: Any) -> Any:
        if isinstance(given, list):
            return [self.sources((*path, index), source) for index, source in enumerate(given)]
        if isinstance(given, Source):
            return given.model_copy(update={"path": self.sources((*path, "path"), given.path)})
        base = self.base(path)
        elsewhere = "://" in given or (_names_hub_data(given) and not os.path.exists(base / given))
        return given if elsewhere else absolute(given, base)

    def base(self, path: KeyPath) -> Path:
        return base_folder(self.document, origin(self.document.data, ("phases", self.name, *path)), self.file)


def _of(section: dict[str, Any], key: str) -> dict[str, Any]:
    """A section inside another; empty if there is none or it is no mapping (told elsewhere)."""
    inner = section.get(key)
    return inner if isinstance(inner, dict) else {}


def _is_model(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, file)) for file in ("config.json", ADAPTER_CONFIG))


def _phases_in(job_file: Path) -> list[str]:
    """Names of the phases of a job file, none if it cannot be read."""
    try:
        phases = yaml_with_lines.load(job_file).data.get("phases")
    except InputError:
        return []
    return list(phases) if isinstance(phases, dict) else []


def _merged(top: Any, own: Any, has_own: bool) -> Any:
    """`own` over `top`, key by key where both are mappings."""
    if not (isinstance(top, dict) and isinstance(own, dict)):
        return own if has_own else top
    return top | {key: _merged(top.get(key), value, True) for key, value in own.items()}


def origin(data: dict[str, Any], path: KeyPath) -> KeyPath:
    """Where a phase's setting was written: in the phase, or in the section at the top that the phase inherits."""
    _, phase, *inner = path
    shared = tuple(inner)
    if not shared or shared[0] not in SHARED or shared[0] not in data or _holds(data, path):
        return path
    return shared if _holds(data, shared) or shared[0] not in data["phases"][phase] else path


def _holds(data: Any, path: KeyPath) -> bool:
    for part in path:
        if not (isinstance(data, dict) and part in data):
            return False
        data = data[part]
    return True


# Paths


def base_folder(document: Document, path: KeyPath, file: Path) -> Path:
    """The folder that a relative path given at `path` is relative to."""
    return Path.cwd() if document.line(path) == COMMAND_LINE else file.parent


def _says_local(path: str) -> bool:
    return path in (".", "..") or path.startswith(("./", "../", "/", "~"))


def _names_hub_data(path: str) -> bool:
    return bool(files.HUB_NAME.fullmatch(path)) and not path.endswith(files.DATA_SUFFIXES + files.FOREIGN_SUFFIXES)
