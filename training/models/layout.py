"""Finds out from a model's class which of its tensors are buffers, without allocating its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from training.config import Model
from training.model_folder import inspect, tensor_shapes


def empty_model(model: Model, *, classifier: bool = False) -> Any:
    """The model of a folder or hub id as transformers builds it, without the memory of its parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(
        model.path, trust_remote_code=model.trust_remote_code, revision=model.revision or "main"
    )
    if classifier:
        config.num_labels = 1
    with torch.device("meta"):  # keeps tied weights tied
        return kind.from_config(config, trust_remote_code=model.trust_remote_code)


def buffers(model: Model, *, classifier: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are stored with the weights and never trained, such
    as a router's biases: training leaves them as they are.

    By their names in the model, in the type that they are stored in.
    """
    empty = empty_model(model, classifier=classifier)
    trained = {name for name, each in empty.named_parameters(remove_duplicate=False) if each.requires_grad}
    names = set(empty.state_dict()) - trained
    if not names:
        return
    folder = Path(model.path)
    if folder.is_dir() and names <= tensor_shapes(folder).keys():
        yield from _read(folder, names)
    else:  # transformers gives them other names when it loads them
        loaded = _loaded(model, classifier).state_dict()
        yield from ((name, loaded[name]) for name in sorted(names))


def _read(folder: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    for file in inspect(folder, tokenizer_elsewhere=True, check_code=False, classifier=True).weight_files:
        with safe_open(file, "pt") as tensors:
            for name in sorted(names & set(tensors.keys())):
                yield name, tensors.get_tensor(name)


def _loaded(model: Model, classifier: bool) -> Any:
    from training.models.loading import pretrained

    lm, _ = pretrained(model, "auto", "cpu", classifier=classifier)
    return lm
