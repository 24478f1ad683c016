"""A checkpoint -> a plain Hugging Face folder. Reads parameters one by one, so a 70B model needs the memory of one shard.

Weights come from the checkpoint alone; configuration and tokenizer from the model that the phase started from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from training.checkpoint import Reader
from training.config import Phase
from training.errors import TrainingError
from training.storage import Local, Place, upload

SHARD_BYTES = 4 << 30
_PLAIN_FORMATS = {"text", "prompt_completion"}


def export(checkpoint: Place, out: Place, phase: Phase, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model of a checkpoint to folder `out` (replaced if it exists) in the type that it was trained in.

    Raises CheckpointError if the checkpoint is damaged, TrainingError if the model cannot be written.
    """
    if isinstance(out, Local):
        _export(checkpoint, out.path, phase, shard_bytes)
        return
    with tempfile.TemporaryDirectory(prefix="muster-export-") as folder:
        local = Path(folder) / "model"
        _export(checkpoint, local, phase, shard_bytes)
        out.remove()
        upload(local, out)


def _export(checkpoint: Place, out: Path, phase: Phase, shard_bytes: int) -> None:
    staged = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        _write(staged, checkpoint, phase, shard_bytes)
        shutil.rmtree(out, ignore_errors=True)
        staged.rename(out)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"the model cannot be written: {error}: {out}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(staged: Path, checkpoint: Place, phase: Phase, shard_bytes: int) -> None:
    reader = Reader(checkpoint)
    dtype = getattr(torch, reader.manifest.dtype)
    _write_weights(staged, _weights(reader, dtype), shard_bytes)
    _write_config(staged, phase, dtype)
    _write_tokenizer(staged, phase, learnt_chats=bool(reader.manifest.formats.keys() - _PLAIN_FORMATS))


def _weights(reader: Reader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in reader.manifest.parameters:
        yield name, torch.from_numpy(reader.whole(name)).to(dtype)


def _write_weights(folder: Path, weights: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """model.safetensors, or numbered shards with an index when the weights are larger than one."""
    files: list[Path] = []
    where: dict[str, int] = {}
    batch: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / f"shard-{len(files)}"
        save_file(batch, path, metadata={"format": "pt"})
        where.update({name: len(files) for name in batch})
        files.append(path)
        batch.clear()

    for name, tensor in weights:
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > shard_bytes:
            flush()
        batch[name] = tensor
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_config(folder: Path, phase: Phase, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, GenerationConfig

    config: Any = AutoConfig.from_pretrained(phase.model.path, trust_remote_code=phase.model.trust_remote_code)
    config.dtype = dtype
    config.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(phase.model.path)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complaints about sampling settings that the base model came with
        generation.save_pretrained(folder)


def _write_tokenizer(folder: Path, phase: Phase, learnt_chats: bool) -> None:
    """The tokenizer, with the chat template that the model has learnt, if it has learnt one."""
    from training.data.render import Renderer, load_tokenizer

    tokenizer = load_tokenizer(phase.model.tokenizer or phase.model.path, phase.model.trust_remote_code)
    if learnt_chats and phase.data.template != "none":
        tokenizer.chat_template = Renderer(tokenizer, phase.data.template).chat_template()
    tokenizer.save_pretrained(folder)
