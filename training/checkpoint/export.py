"""A checkpoint -> a plain Hugging Face folder. Reads parameters one by one,
so a 70B model needs the memory of one shard.

Trained weights come from the checkpoint; frozen ones, configuration and tokenizer from the model
that the phase started from.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.checkpoint.format import Reader
from training.config import Phase
from training.data.render import Renderer, tokenizer_for
from training.data.templates import without_marks
from training.data.turn_end import stop_tokens
from training.data.vocabulary import embedding_rows
from training.errors import TrainingError
from training.io.owned_folders import temporary_folder
from training.model_folder import (
    EMBEDDING,
    MODEL_INFO,
    SCORE,
    TOKEN_HEADS,
    base_of,
    folder_of,
    inspect,
    merge_first,
    quantization,
    tensor_shapes,
)
from training.models.layout import buffers
from training.models.lora import NAME, base_name, delta, transposed_in, write_folder
from training.recipes import RECIPES
from training.storage import Local, StoragePath, upload

SHARD_BYTES = 4 << 30
_HEADS = ("lm_head", "embed_out", SCORE)


def export(
    checkpoint: StoragePath, out: StoragePath, phase: Phase, *, merge: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model of a checkpoint to folder `out` (replaced if it exists) in the type that it was trained in.

    Of a phase with LoRA that is a PEFT adapter, or with `merge` the model with the adapter added to its weights.
    Raises CheckpointError if the checkpoint is damaged, TrainingError if the model cannot be written.
    """
    if isinstance(out, Local):
        _export(checkpoint, out.path, phase, merge, shard_bytes)
        return
    with temporary_folder("muster-export-") as folder:
        local = folder / "model"
        _export(checkpoint, local, phase, merge, shard_bytes)
        out.remove()
        upload(local, out)


def _export(checkpoint: StoragePath, out: Path, phase: Phase, merge: bool, shard_bytes: int) -> None:
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
    classifier = RECIPES[phase.recipe].is_classifier
    base, lora = base_of(phase.model.path), phase.model.lora
    renderer = _renderer(phase, learnt_chats=reader.manifest.chats)
    tokenizer = renderer.tokenizer
    info = _info(reader, phase, classifier)
    if classifier:
        give_pad_token(tokenizer, chats=reader.manifest.chats, rows=embedding_rows(phase.model.path))
    if lora is not None and not merge:
        write_folder(staged, dict(_weights(reader, dtype)), phase, classifier=classifier)
    else:
        write = _whole if lora is None else _merged
        weights = write(reader, phase, dtype, classifier)
        _write_weights(staged, weights, shard_bytes)
        _write_config(staged, phase, base, dtype, tokenizer, classifier, _rows_of_embedding(reader))
    if not classifier:
        info["stop_tokens"] = _write_generation_config(staged, phase, base, renderer, chats=reader.manifest.chats)
    tokenizer.save_pretrained(staged)
    (staged / MODEL_INFO).write_text(json.dumps(info, indent=1) + "\n")


def _whole(reader: Reader, phase: Phase, dtype: torch.dtype, classifier: bool) -> Iterator[tuple[str, Tensor]]:
    """All that a model's folder holds: the weights as they were trained, and what lies beside them in the base."""
    yield from _weights(reader, dtype)
    base = phase.model.model_copy(update={"path": base_of(phase.model.path), "attention": "auto"})
    yield from buffers(base, classifier=classifier)


def _weights(reader: Reader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in reader.parameters:
        yield name, torch.from_numpy(reader.whole(name)).to(dtype)


def _merged(reader: Reader, phase: Phase, dtype: torch.dtype, classifier: bool) -> Iterator[tuple[str, Tensor]]:
    """The base's weights with the adapters added, tensor by tensor, and what was trained whole;
    by the names of the loaded model."""
    base, lora = Path(folder_of(base_of(phase.model.path), phase.model.revision)), phase.model.lora
    assert lora is not None, "a phase that has trained adapters"
    if (method := quantization(base)) is not None:
        raise TrainingError(
            f"{base} has quantized weights ({method}), into which no adapter can be merged: {merge_first(base)}"
        )
    downs = {base_name(name.replace(f".lora_A.{NAME}.", ".")): name for name in reader.parameters if ".lora_A." in name}
    whole = [name for name in reader.parameters if ".lora_" not in name]
    rows, transposed = _rows_of_embedding(reader), transposed_in(phase)
    body = next(iter(downs)).partition(".")[0] + "."
    for name, tensor in _of_base(base, phase, body, set(downs)):
        is_tied_copy = rows is not None and name.endswith(TOKEN_HEADS) and len(tensor) != rows
        if name in whole or is_tied_copy or (classifier and not name.startswith(body)):
            continue
        if down := downs.pop(name, None):
            a, b = (torch.from_numpy(reader.whole(each)) for each in (down, down.replace(".lora_A.", ".lora_B.")))
            change = delta(a, b, lora.alpha / lora.rank)
            tensor = tensor.float() + (change.T if name in transposed else change)
        yield name, tensor.to(dtype)
    for name in sorted([*whole, *downs]):
        if name in downs:
            raise TrainingError(f"{base} has no weight {name}, which the adapter was trained on: {merge_first(base)}")
        yield name, torch.from_numpy(reader.whole(name)).to(dtype)


def _of_base(base: Path, phase: Phase, body: str, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the base by their names in the loaded model: read one by one where the files have these names, but
    perhaps for the prefix of the body, which GPT-2 as published lacks; else from the loaded model."""
    stored = tensor_shapes(base)
    lacks_prefix = not any(name.startswith(body) for name in stored)
    names = {
        name: f"{body}{name}" if lacks_prefix and name.partition(".")[0] not in _HEADS else name for name in stored
    }
    if not wanted <= set(names.values()):
        yield from _of_loaded(base, phase)
        return
    for file in inspect(base, tokenizer_elsewhere=True, check_code=False, classifier=True).weight_files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                yield names[name], tensors.get_tensor(name)


def _of_loaded(base: Path, phase: Phase) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model that transformers renames or joins while it loads them. Tied ones once."""
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", use_safetensors=True, trust_remote_code=phase.model.trust_remote_code,
        revision=phase.model.revision or "main",
    )  # fmt: skip
    seen: set[int] = set()
    for name, tensor in lm.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor


def _rows_of_embedding(reader: Reader) -> int | None:
    """Rows of the embedding, if it was trained."""
    return next((shape[0] for name, shape in reader.parameters.items() if EMBEDDING.search(name)), None)


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


def _write_config(
    folder: Path, phase: Phase, base: str, dtype: torch.dtype, tokenizer: Any, classifier: bool, rows: int | None
) -> None:
    from transformers import AutoConfig

    revision = phase.model.revision or "main"
    config: Any = AutoConfig.from_pretrained(base, trust_remote_code=phase.model.trust_remote_code, revision=revision)
    config.dtype = dtype
    if rows is not None and rows > config.get_text_config().vocab_size:  # it has grown
        config.get_text_config().vocab_size = rows
    if classifier:
        config.architectures = [_classifier_of(config)]
        config.num_labels = 1
        for each in {id(config): config, id(text := config.get_text_config()): text}.values():
            each.pad_token_id = tokenizer.pad_token_id
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
    return str(kind.__name__)


def give_pad_token(tokenizer: Any, *, chats: bool, rows: int | None) -> None:
    """See that the tokenizer of a reward model pads with a token that no sequence ends with.

    transformers reads the score at the last token that is not the padding. `rows`: of the embedding, where they are
    known. Without such a token the padding is left out: transformers then reads the last token, and refuses batches.
    """
    ends = _last_tokens(tokenizer, chats)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    by_name = sorted(special, key=lambda token: "pad" not in token.lower())
    # No byte of text in UTF-8 is 0xFF, so the token of this byte (as tokenizers of bytes write it) stands for nothing.
    # Only the letter that it is written as reads as padding from then on: a price that tokenizers with any other
    # special token do not pay.
    candidates = [tokenizer.unk_token, tokenizer.bos_token, *by_name, "<0xFF>", "\u00ff"]
    tokenizer.pad_token = next(
        (
            token
            for token in candidates
            if token in vocabulary and vocabulary[token] not in ends and (rows is None or vocabulary[token] < rows)
        ),
        None,
    )


def _last_tokens(tokenizer: Any, chats: bool) -> set[int]:
    """Tokens that judged sequences may end with: the EOS, and what the chat template writes last."""
    from training.data.formats import Chat
    from training.data.render import Renderer, Sample

    ends = {tokenizer.eos_token_id}
    if chats:
        turns = [("user", "a"), ("assistant", "b")]
        chat = Chat([{"role": role, "content": text} for role, text in turns], loss_turns=(1,))
        ends |= {int(each.ids[-1]) for each in Renderer(tokenizer).render([chat]) if isinstance(each, Sample)}
    return ends


def _info(reader: Reader, phase: Phase, classifier: bool) -> dict[str, Any]:
    manifest = reader.manifest
    info: dict[str, Any] = {
        "recipe": phase.recipe,
        "step": manifest.step,
        "questions": "chat" if manifest.chats else "plain",
        "bos": manifest.bos,
    }
    if classifier:  # mean and standard deviation on the evaluation data, for whoever wants to normalise
        names = ("mean", "std")
        info["reward"] = {
            n: manifest.metrics[f"eval_reward_{n}"] for n in names if f"eval_reward_{n}" in manifest.metrics
        }
    return info


def _renderer(phase: Phase, learnt_chats: bool) -> Renderer:
    """The renderer of the phase. Its tokenizer has the chat template
    that the model has learnt, if it has learnt one."""
    tokenizer: Any = tokenizer_for(phase.model)
    renderer = Renderer(tokenizer, phase.data.template, bos=phase.data.bos)
    if learnt_chats:
        tokenizer.chat_template = without_marks(renderer.chat_template())
    return renderer
