"""Examines the models of a phase before training: on the CPU of this machine, in a process that may crash, once
per model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

from launcher.process.subprocesses import module_command, with_own_code
from launcher.workers import supervisor
from launcher.workers.errors import Raised, WorkerDied, describe
from training.config import Model, Phase
from training.errors import InputError, Problem
from training.estimate import model_traits
from training.estimate.model_traits import Traits
from training.io import hub
from training.model_folder import base_of, configured_in, on_hub

_LIMIT_S = 300
"""For one model."""


def examined(phase: Phase, *, apart: bool = True) -> Traits | None:
    """What is known of the model that a phase trains; of all its models afterwards. None: it is on the hub or in a
    bucket, not at hand, and examined where the job runs.

    `apart`: in another process where nothing is known yet. Raises InputError for a model that cannot be loaded.
    """
    if apart:
        for model in _models(phase):
            _examine(model)
    return model_traits.known_of(phase)


def pass_on(phase: Phase) -> None:
    """Let the workers of a phase know what is known of its models."""
    keys = [model_traits.key_for(model) for model in _models(phase)]
    model_traits.pass_on([key for key in keys if key is not None])


def _models(phase: Phase) -> Iterator[Model]:
    """Those whose configuration is on this machine, or to be had from the hub at once."""
    rewards = (source.path for source in phase.rewards if source.is_model)
    paths = [phase.model.path, *phase.named_models.values(), *rewards]
    for path in dict.fromkeys(base_of(path) for path in paths if path):
        revision = phase.model.revision if path == phase.model.path else None
        if on_hub(path):
            hub.file_at_hand(path, "config.json", revision)
        if configured_in(path, revision) is not None:
            yield Model(path=path, revision=revision, trust_remote_code=phase.model.trust_remote_code)


def _examine(model: Model) -> None:
    key = model_traits.key_for(model)
    if key is None or model_traits.known(key) is not None:
        return
    why = _by_the_fork_server(model) if supervisor.has_fork_server() else _by_a_process(model)
    folder = configured_in(model.path, model.revision)
    if why and folder is not None:  # what nobody could find out is not tried again
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_traits.remember(
            key, Traits(architecture=str((config.get("architectures") or ["the model"])[0]), unknown=why)
        )


def _by_the_fork_server(model: Model) -> str:
    """Why it could not be found out, if it could not."""
    try:
        supervisor.apart("examine", model, dict(os.environ), _LIMIT_S)
    except (Raised, WorkerDied) as error:
        return f"the process that examined it {describe(error)}"
    return ""


def _by_a_process(model: Model) -> str:
    settings = json.dumps(
        {"path": model.path, "revision": model.revision, "trust_remote_code": model.trust_remote_code}
    )
    command = module_command("training.models.probe", settings)
    environment = with_own_code({**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it took more than {_LIMIT_S} s"
    if ended.returncode == model_traits.INPUT_WRONG:
        raise InputError([Problem(*problem) for problem in json.loads(ended.stdout.splitlines()[-1])])
    last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
    return f"the process that examined it ended with status {ended.returncode}: {last}" if ended.returncode else ""
