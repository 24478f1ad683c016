"""The commits that a run uses of models and data sets on the Hugging Face hub: looked up once, recorded,
used again when it goes on.

A branch moves. Where a job names one, or none, its phases are given the commit that it was when the run began.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from launcher.jobfile.job import Job
from training.config import Phase, Source
from training.data.files import HUB_NAME, hub_name
from training.errors import InputError, Problem
from training.model_folder import on_hub

COMMIT = re.compile(r"[0-9a-f]{40}")
PATIENCE_S = 10.0
"""Longest time for a response of the hub."""


class Named(NamedTuple):
    """A model or data set on the hub that a job names."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None
    """Branch, tag or commit. None: the default branch."""

    @property
    def key(self) -> str:
        """The key by which it is recorded: `model owner/name@v1`."""
        return f"{self.kind} {self.name}" + (f"@{self.revision}" if self.revision else "")


def with_commits(phase: Phase, commits: Mapping[str, str]) -> Phase:
    """Return the phase with branches and tags replaced by their commits, as far as they are known."""
    model = phase.model.model_copy(
        update={
            "revision": _commit("model", phase.model.path, phase.model.revision, commits),
            "tokenizer_revision": _commit("model", phase.model.tokenizer, phase.model.tokenizer_revision, commits),
        }
    )
    data = phase.data.model_copy(
        update={"train": _sources(phase.data.train, commits), "eval": _sources(phase.data.eval, commits)}
    )
    asked = phase.eval and phase.eval.model_copy(
        update={"data": _sources(phase.eval.data, commits), "verdicts": _sources(phase.eval.verdicts, commits)}
    )
    return phase.model_copy(update={"model": model, "data": data, "eval": asked})


def _commit(
    kind: Literal["model", "dataset"], name: str | None, revision: str | None, commits: Mapping[str, str]
) -> str | None:
    return commits.get(Named(kind, name, revision).key, revision) if name else revision


def _sources(given: Any, commits: Mapping[str, str]) -> Any:
    if isinstance(given, list):
        return [_sources(source, commits) for source in given]
    if isinstance(given, Source):
        named = _data_set(given.path, given.revision)
        if named is None or named.key not in commits:
            return given
        return given.model_copy(update={"path": named.name, "revision": commits[named.key]})
    named = _data_set(given) if given else None
    return f"{named.name}@{commits[named.key]}" if named is not None and named.key in commits else given


def _data_set(path: str, revision: str | None = None) -> Named | None:
    """Return the data set on the hub that a source names; None for files."""
    if not HUB_NAME.fullmatch(path) or Path(path).exists():
        return None
    name, own = hub_name(path)
    return Named("dataset", name, own or revision)


def look_up(job: Job, recorded: Mapping[str, str]) -> dict[str, str]:
    """Look up the commits of a job's models and data sets that are not recorded yet, by key. Unknown ones are omitted.

    Raises InputError for names and revisions that the hub does not have.
    """
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for named in dict.fromkeys(one for phase in job.phases.values() for one in _named(phase)):
        if named.key in recorded or COMMIT.fullmatch(named.revision or ""):
            continue
        try:
            commit = commit_of(named)
        except InputError as error:
            problems += error.problems
            continue
        if commit is not None:
            found[named.key] = commit
    if problems:
        raise InputError(problems)
    return found


def _named(phase: Phase) -> Iterator[Named]:
    model = phase.model
    if on_hub(model.path):
        yield Named("model", model.path, model.revision)
    if model.tokenizer and on_hub(model.tokenizer):
        yield Named("model", model.tokenizer, model.tokenizer_revision)
    given = [phase.data.train, phase.data.eval]
    given += [phase.eval.data, phase.eval.verdicts] if phase.eval is not None else []
    for sources in given:
        for source in sources if isinstance(sources, list) else [sources] if sources else []:
            path, revision = (source.path, source.revision) if isinstance(source, Source) else (source, None)
            if (named := _data_set(path, revision)) is not None:
                yield named


def commit_of(named: Named) -> str | None:
    """Return the current commit of a branch or tag; from the library's cache if the hub does not answer. None: unknown.

    Raises InputError if the hub has no such model, data set or revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().repo_info(named.name, repo_type=named.kind, revision=named.revision, timeout=PATIENCE_S)
            return info.sha
    except RevisionNotFoundError:
        raise InputError.of(
            named.name, f"the {named.kind} on the hub has no branch, tag or commit {named.revision}"
        ) from None
    except RepositoryNotFoundError:
        return None  # the loader says what that may mean
    except Exception:
        pass
    folder = Path(constants.HF_HUB_CACHE) / f"{named.kind}s--{named.name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / (named.revision or "main")).read_text().strip()
    except OSError:
        return None
    return commit if COMMIT.fullmatch(commit) else None
