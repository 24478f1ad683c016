"""A checkpoint -> a plain Hugging Face folder. Reads parameters one by one, so a 70B model needs the memory of one shard.

Trained weights come from the checkpoint; frozen ones, configuration and tokenizer from the model that the phase started from.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.checkpoint import Reader
from training.config import Lora, Phase
from training.data.render import Renderer, tokenizer_for
from training.data.templates import without_marks
from training.data.turn_end import stop_tokens
from training.errors import TrainingError
from training.lora import NAME, base_name, delta, write_folder
from training.modelfiles import FACTS, base_of, inspect
from training.recipes import RECIPES
from training.storage import Local, Place, upload

SHARD_BYTES = 4 << 30


def export(checkpoint: Place, out: Place, phase: Phase, *, merge: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model of a checkpoint to folder `out` (replaced if it exists) in the type that it was trained in.

    Of a phase with LoRA that is a PEFT adapter, or with `merge` the model with the adapter added to its weights.
    Raises CheckpointError if the checkpoint is damaged, TrainingError if the model cannot be written.
    """
    if isinstance(out, Local):
        _export(checkpoint, out.path, phase, merge, shard_bytes)
        return
    with tempfile.TemporaryDirectory(prefix="muster-export-") as folder:
        local = Path(folder) / "model"
        _export(checkpoint, local, phase, merge, shard_bytes)
        out.remove()
        upload(local, out)


def _export(checkpoint: Place, out: Path, phase: Phase, merge: bool, shard_bytes: int) -> None:
    staged = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        _write(staged, Reader(checkpoint, RECIPES[phase.recipe].exports), phase, merge, shard_bytes)
        shutil.rmtree(out, ignore_errors=True)
        staged.rename(out)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"the model cannot be written: {error}: {out}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(staged: Path, reader: Reader, phase: Phase, merge: bool, shard_bytes: int) -> None:
    dtype = getattr(torch, reader.manifest.dtype)
    classifier = RECIPES[phase.recipe].makes == "classifier"
    base, lora = base_of(phase.model.path), phase.model.lora
    renderer = _renderer(phase, learnt_chats=reader.manifest.chats)
    tokenizer = renderer.tokenizer
    facts = _facts(reader, phase, classifier)
    if classifier:
        _give_pad_token(tokenizer)
    if lora is not None and not merge:
        write_folder(staged, dict(_weights(reader, dtype)), phase, classifier=classifier)
    else:
        weights = _weights(reader, dtype) if lora is None else _merged(reader, base, lora, dtype, classifier)
        _write_weights(staged, weights, shard_bytes)
        _write_config(staged, phase, base, dtype, tokenizer, classifier)
    if not classifier:
        facts["stop_tokens"] = _write_generation_config(staged, phase, base, renderer, chats=reader.manifest.chats)
    tokenizer.save_pretrained(staged)
    (staged / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def _weights(reader: Reader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in reader.parameters:
        yield name, torch.from_numpy(reader.whole(name)).to(dtype)


def _merged(
    reader: Reader, base: str, lora: Lora, dtype: torch.dtype, classifier: bool
) -> Iterator[tuple[str, Tensor]]:
    """The base's weights with the adapters added, tensor by tensor, and what was trained whole."""
    trained = set(reader.parameters)
    downs = {base_name(name.replace(f".lora_A.{NAME}.", ".")): name for name in trained if ".lora_A." in name}
    body = next(iter(downs)).partition(".")[0] + "."
    for file in inspect(Path(base), tokenizer_elsewhere=True, trust_remote_code=True, classifier=True).weight_files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name in trained or (classifier and not name.startswith(body)):
                    continue
                tensor = tensors.get_tensor(name)
                if down := downs.pop(name, None):
                    up = down.replace(".lora_A.", ".lora_B.")
                    a, b = (torch.from_numpy(reader.whole(each)) for each in (down, up))
                    change = delta(a, b, lora.alpha / lora.rank)
                    tensor = tensor.float() + (change if change.shape == tensor.shape else change.T)
                yield name, tensor.to(dtype)
    if downs:
        raise TrainingError(f"{base} stores its weights under other names: {', '.join(sorted(downs)[:3])} is not there")
    for name in sorted(trained):
        if ".lora_" not in name:
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


def _write_config(folder: Path, phase: Phase, base: str, dtype: torch.dtype, tokenizer: Any, classifier: bool) -> None:
    from transformers import AutoConfig

    revision = phase.model.revision or "main"
    config: Any = AutoConfig.from_pretrained(base, trust_remote_code=phase.model.trust_remote_code, revision=revision)
    config.dtype = dtype
    if classifier:
        config.architectures = [_classifier_of(config)]
        config.num_labels = 1
        config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)


def _write_generation_config(folder: Path, phase: Phase, base: str, renderer: Renderer, *, chats: bool) -> list[int]:
    """The base model's, with the tokens that the phase has learnt to end responses with. Returns all that end one."""
    from transformers import AutoConfig, GenerationConfig

    trust, revision = phase.model.trust_remote_code, phase.model.revision or "main"
    try:
        generation = GenerationConfig.from_pretrained(base, revision=revision)
    except OSError:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust, revision=revision)
        generation = GenerationConfig.from_model_config(config)
    stops = stop_tokens(renderer, generation, chats=chats)
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complaints about sampling settings that the base model came with
        generation.save_pretrained(folder)
    return stops


def _classifier_of(config: Any) -> str:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return kind.__name__


def _give_pad_token(tokenizer: Any) -> None:
    """A reward model finds the last token by looking for padding, so that must not be the token that answers end with."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        other = next(i for i in range(2) if i != tokenizer.eos_token_id)
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(other)


def _facts(reader: Reader, phase: Phase, classifier: bool) -> dict[str, Any]:
    manifest = reader.manifest
    facts: dict[str, Any] = {
        "recipe": phase.recipe,
        "step": manifest.step,
        "questions": "chat" if manifest.chats else "plain",
        "bos": manifest.bos,
    }
    if classifier:  # mean and standard deviation on the evaluation data, for whoever wants to normalise
        names = ("mean", "std")
        facts["reward"] = {
            n: manifest.metrics[f"eval_reward_{n}"] for n in names if f"eval_reward_{n}" in manifest.metrics
        }
    return facts


def _renderer(phase: Phase, learnt_chats: bool) -> Renderer:
    """The renderer of the phase. Its tokenizer has the chat template that the model has learnt, if it has learnt one."""
    tokenizer: Any = tokenizer_for(phase.model)
    renderer = Renderer(tokenizer, phase.data.template, bos=phase.data.bos)
    if learnt_chats:
        tokenizer.chat_template = without_marks(renderer.chat_template())
    return renderer
