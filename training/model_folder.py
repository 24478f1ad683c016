"""What a Hugging Face model folder holds, read from config.json and the headers of the weights alone. Free of torch."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.config import Model, Phase
from training.errors import InputError, Problem
from training.io import foreign_files, hub
from training.io.paths import absolute, is_below
from training.storage import is_remote, local_copy, open_storage

CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
CLASSIFIER_SUFFIX = "ForSequenceClassification"
MODEL_INFO = "muster.json"
"""What Muster writes beside a model: recipe, step, how questions are put to it, and the rewards of a reward model."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
EMBEDDING = re.compile(r"(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte)\.weight$")
TOKEN_HEADS = ("lm_head.weight", "embed_out.weight")
"""What the weights of a head for tokens are called, unless they are those of the embedding."""
SCORE = "score"
"""What Hugging Face's sequence classifiers of the decoder kind call their head."""
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LAYER_OF_BODY = re.compile(r"(?:layers|h|blocks)\.(\d+)\.")
_MOST_LAYERS = 10_000
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}  # fmt: skip
"""Of one number, by safetensors' name of its type."""
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
"""Torch's names of safetensors' types; others keep safetensors' name."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a sound model folder without loading it."""

    architecture: str
    """Class that the weights are for, such as LlamaForCausalLM."""
    model_type: str
    num_parameters: int
    """Numbers in the stored tensors; tied weights count once."""
    bytes: int
    """Size of the stored tensors."""
    dtype: str
    """The type that most numbers are stored in, by torch's name."""
    vocab_size: int | None
    max_positions: int | None
    """Longest sequence, in tokens, that config.json allows. None: not said."""
    weight_files: tuple[Path, ...]


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int
    """Place of its first byte in the file."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a PEFT folder."""

    folder: Path
    base: str
    """Folder of the model that it was trained on; its name if that is on the hub and not in the library's cache."""
    base_name: str
    """The same as it is named in the adapter's folder."""
    rank: int
    alpha: float
    targets: list[str] | str
    """Ends of the names of the layers that have adapters, or a regular expression for whole names."""
    heads: list[str]
    """Scalar heads that were trained whole beside it."""
    whole: dict[str, tuple[int, ...]]
    """Parameters of the language model that are saved whole, by the model's own names,
    with their shapes: embedding and head."""
    classifier: bool
    """Whether it is the adapter of a reward model."""
    revision: str | None = None
    """Of the base, if that is on the hub."""

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the embedding that it brings, if it brings one."""
        return next((shape[0] for name, shape in self.whole.items() if EMBEDDING.search(name)), None)


def recorded_info(folder: str) -> dict[str, Any]:
    """What Muster wrote beside a model; empty for a model of another make."""
    try:
        info = foreign_files.loads((Path(folder) / MODEL_INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_in(path: str) -> Adapter | None:
    """The adapter that a folder holds, None if it holds a whole model, or the path is a hub id.

    Raises InputError for adapters of which a setting or a tensor would not be applied here.
    """
    folder = Path(path)
    if not is_adapter(folder):
        return None
    file = folder / ADAPTER_CONFIG
    with foreign_files.made_sense_of(
        lambda why: InputError.of(str(file), f"not a readable adapter of LoRA ({why}); copy it again")
    ):
        return _read_adapter(folder, file)


def _read_adapter(folder: Path, file: Path) -> Adapter:
    try:
        config = foreign_files.loads(file.read_text(encoding="utf-8"))
        kind, base = str(config["peft_type"]), config["base_model_name_or_path"]
        rank, alpha = (int(config["r"]), float(config["lora_alpha"])) if kind == "LORA" else (0, 0.0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError.of(str(file), f"not a readable adapter of LoRA ({error!r}); copy it again") from None
    if kind in _NOT_MERGED_BY_PEFT:
        raise InputError.of(str(file), _cannot_be_merged(kind))
    odd = _settings_not_applied(config) if kind == "LORA" else [f"peft_type {kind}"]
    if odd:
        raise _not_loaded(file, odd, folder)
    if not isinstance(base, str) or not base:
        raise InputError.of(
            str(file), "does not say which model it was trained on; set base_model_name_or_path to its folder"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError.of(str(folder), _no_adapter_weights(folder))
    shapes = _adapter_shapes(folder)
    if unknown := _tensors_not_applied(shapes):
        raise _not_loaded(folder / ADAPTER_WEIGHTS, [f"tensors {_some(unknown, 3)}"], folder)
    _refuse_another_rank(file, shapes, rank)
    saved = {name: shape for name, shape in shapes.items() if ".lora_" not in name}
    heads = [SCORE] if f"{SCORE}.weight" in saved else []
    return Adapter(
        folder, folder_of(base, config.get("revision")), base, rank, alpha, _targets(config["target_modules"]), heads,
        whole={name: shape for name, shape in saved.items() if name != f"{SCORE}.weight"},
        classifier=bool(heads) or config.get("task_type") == "SEQ_CLS",
        revision=config.get("revision"),
    )  # fmt: skip


def folder_of(name: str, revision: str | None = None) -> str:
    """The folder that a model's name means here, also in the cache of the hub's library; else the name."""
    if os.path.isdir(name):
        return absolute(name)
    cached = hub.cached_folder(name, revision) if on_hub(name) else None
    return name if cached is None else str(cached)


def fetch_base(folder: str) -> None:
    """Fetch the model below an adapter from the hub, unless it is here. Raises InputError if it cannot be had."""
    adapter = adapter_in(folder)
    if adapter is not None and on_hub(adapter.base):
        hub.fetched_folder(adapter.base, adapter.revision)


_NOT_MERGED_BY_PEFT = frozenset(
    {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)
"""Kinds of adapters that PEFT cannot add to the weights of the model below: they are no change of weights."""


def _cannot_be_merged(kind: str) -> str:
    return (
        f"an adapter of the kind {kind}, which is no change of the weights: it can be neither loaded here nor merged "
        "by PEFT; use a LoRA adapter"
    )


def _no_adapter_weights(folder: Path) -> str:
    if (pickle := folder / "adapter_model.bin").is_file():
        return (
            f"has its weights in {pickle.name}, a pickle, which can run code when it is loaded; convert it where you "
            "trust it: "
            f'safetensors.torch.save_file(torch.load("{pickle}", weights_only=True), "{folder / ADAPTER_WEIGHTS}")'
        )
    return f"has no {ADAPTER_WEIGHTS}{_contents(folder)}"


def _refuse_another_rank(file: Path, shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """Raises InputError if the tensors have another rank than the configuration says: the scale would be wrong."""
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight")}
    ranks |= {shape[1] for name, shape in shapes.items() if name.endswith(".lora_B.weight")}
    if ranks - {rank}:
        there = ", ".join(map(str, sorted(ranks)))
        raise InputError.of(str(file), f"says r {rank}, but its tensors have rank {there}; copy the adapter again")


def _targets(given: Any) -> list[str] | str:
    return given if isinstance(given, str) else sorted(given)


_NOTHING: tuple[Any, ...] = (None, False, "none", "", [], {})
_HARMLESS = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "peft_version",
    ),
    *("r", "lora_alpha", "target_modules", "modules_to_save", "ensure_weight_tying", "fan_in_fan_out", "lora_dropout"),
    *("init_lora_weights", "layers_pattern", "megatron_core", "runtime_config", "qalora_group_size"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
}
"""Settings of PEFT's LoraConfig that are applied, or that only say how the training began."""
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the weights of the model below as they are."""


def _settings_not_applied(config: dict[str, Any]) -> list[str]:
    """Settings of an adapter that change what it computes and are not applied here. Unknown ones count as such."""
    odd = [key for key, value in config.items() if key not in _HARMLESS and value not in _NOTHING]
    if (start := config.get("init_lora_weights")) not in _STARTS:
        odd.append(f"init_lora_weights {start}, which changes the weights below the adapter")
    if not isinstance(targets := config.get("target_modules"), list | str):
        odd.append(f"target_modules {targets!r}")
    return sorted(odd)


def _tensors_not_applied(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors of an adapter that are neither halves of an adapter on a linear layer nor a whole embedding or head."""
    heads = (*TOKEN_HEADS, *(name.replace(".weight", ".bias") for name in TOKEN_HEADS), f"{SCORE}.weight")
    other = {".lora_A.weight": ".lora_B.weight", ".lora_B.weight": ".lora_A.weight"}

    def applied(name: str) -> bool:
        for half, counterpart in other.items():
            if name.endswith(half):
                return name.replace(half, counterpart) in shapes and not EMBEDDING.search(name.replace(half, ".weight"))
        return bool(EMBEDDING.search(name)) or name.endswith(heads)

    return sorted(name for name in shapes if not applied(name))


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors, by names without PEFT's prefix."""
    try:
        tensors = _read_header(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise InputError.of(str(folder / ADAPTER_WEIGHTS), str(error)) from None
    return {name.removeprefix(PEFT_PREFIX): tensor.shape for name, tensor in tensors.items()}


def _not_loaded(file: Path, odd: Sequence[str], folder: Path) -> InputError:
    message = f"a kind of adapter that cannot be loaded here ({', '.join(odd)}): a part of it would not be applied; "
    return InputError.of(str(file), message + merge_first(folder))


def merge_first(folder: Path) -> str:
    """How to get a whole model of an adapter by PEFT alone."""
    return (
        "merge it first with PEFT, and give the merged folder:\n"
        f'  model = peft.AutoPeftModelForCausalLM.from_pretrained("{folder}").merge_and_unload()\n'
        f'  model.save_pretrained("merged")  # and the tokenizer into the same folder'
    )


def base_of(path: str) -> str:
    """The folder or hub id of the weights: of an adapter those it was trained on, else the path itself."""
    adapter = adapter_in(path)
    return adapter.base if adapter is not None else path


def configured_in(path: str, revision: str | None = None) -> Path | None:
    """The folder with the config.json of a model, or of the one below an adapter;
    of the hub that in its library's cache. None: not here."""
    base = base_of(path)
    if on_hub(base):
        file = hub.cached_file(base, "config.json", revision)
        return None if file is None else file.parent
    return Path(base) if (Path(base) / "config.json").is_file() else None


def code_in(model: Model) -> bool:
    """Whether Python code may come with a model or its tokenizer, and its settings have it run or it cannot do without.
    True also where that cannot be seen."""
    folder, tokenizer = configured_in(model.path, model.revision), Path(tokenizer_of(model))
    if folder is None:
        return model.trust_remote_code
    files = (folder / "config.json", folder / "tokenizer_config.json", tokenizer / "tokenizer_config.json")
    configs = [_mapping(file) for file in files]
    brings = any("auto_map" in config for config in configs)
    return brings and (model.trust_remote_code or bool(_needs_its_own_code(configs[0])))


def _mapping(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file holds none."""
    try:
        value = foreign_files.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def check_continues(model: Model) -> None:
    """Raises InputError if the model is an adapter that is to be trained on in another shape than it has."""
    adapter, lora = adapter_in(model.path), model.lora
    if adapter is not None and lora is not None and (lora.rank, lora.alpha) != (adapter.rank, adapter.alpha):
        raise InputError.of(
            str(adapter.folder),
            f"the adapter has rank {adapter.rank} and alpha {adapter.alpha:g}, model.lora says {lora.rank} and "
            f"{lora.alpha:g}; an adapter is trained on in its own shape: say the same, or merge it first (muster "
            "export --merge)",
        )


def unmatched_targets(model: Model) -> list[str]:
    """What is wrong with `lora.targets`, by the weights of the model's folder. Of a hub id nothing is known."""
    folder = Path(base_of(model.path))
    if model.lora is None or isinstance(model.lora.targets, str) or not folder.is_dir():
        return []
    stored = tensor_shapes(folder)
    if not any("experts" in name for name in stored):
        problems = unmatched(model.lora.targets, _linear(stored))
        if not problems:
            return []
    loaded = loaded_shapes(folder, model.trust_remote_code)
    return unmatched(model.lora.targets, _linear(stored if loaded is None else loaded))


def _linear(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Names of the linear layers among parameters."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and not EMBEDDING.search(name)]
    return [name.removesuffix(".weight") for name in matrices]


def rows_of_embedding(folder: Path) -> int | None:
    """Rows of the token embedding in a folder's weights; None if they do not say."""
    shapes = tensor_shapes(folder)
    try:
        config = foreign_files.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    names = _embeddings(shapes, _whole(config, "vocab_size") if isinstance(config, dict) else None)
    return shapes[names[0]][0] if names else None


def _embeddings(shapes: Mapping[str, tuple[int, ...]], vocab_size: int | None) -> list[str]:
    """Names of the token embedding: by its usual names, else a matrix with a row for each token that is no head."""
    usual = [name for name in shapes if EMBEDDING.search(name)]
    as_many = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == vocab_size]
    return sorted(usual, key=lambda name: name not in as_many) or [
        name for name in as_many if not name.endswith(TOKEN_HEADS)
    ]


def loaded_shapes(folder: Path, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the parameters of the loaded model, by the names that it has then: those of the files may be others.

    Loads torch. None if transformers cannot build a model of this configuration.
    """
    try:
        config = foreign_files.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return on_meta_device(config, trust_remote_code)


def on_meta_device(config: Mapping[str, Any], trust_remote_code: bool) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes as transformers makes them, without memory; None if it does not know the architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.for_model(**config)
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, AttributeError, ImportError, TypeError, RuntimeError):
        return None
    return {name: tuple(parameter.shape) for name, parameter in lm.named_parameters()}


def stored_as(parameter: str, stored: Mapping[str, Any]) -> str | None:
    """The name in the files of a parameter of the loaded model: the same, or without or with the prefix of the body.

    GPT-2 as published lacks the prefix `transformer.`. None: it has another name, or is not there.
    """
    without = parameter.partition(".")[2]
    for name in (parameter, without):
        if name in stored:
            return name
    return next((name for name in stored if name.endswith(f".{parameter}")), None)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors, by name; empty if there are no weights in safetensors, or not all of them."""
    if not folder.is_dir():
        return {}
    check = _Check(folder)
    _, tensors = check.weights()
    return {} if check.problems else {name: tensor.shape for name, tensor in tensors.items()}


def unmatched(targets: Sequence[str], layers: Sequence[str]) -> list[str]:
    """What is wrong with LoRA targets that are the end of no layer's name."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    return [
        f"`{target}` matches no linear layer of the model; there are "
        + ", ".join(difflib.get_close_matches(target, ends, n=3, cutoff=0.4) or ends)
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in layers)
    ]


def tokenizer_of(model: Model) -> str:
    """Where the tokenizer is: as the settings say, else with the model, else (an adapter) with the model below it."""
    if model.tokenizer:
        return model.tokenizer
    folder = Path(model.path)
    return base_of(model.path) if is_adapter(folder) and not has_tokenizer(folder) else model.path


def tokenizer_revision(model: Model) -> str | None:
    """Branch, tag or commit of the tokenizer; without effect where that is a folder."""
    return model.tokenizer_revision if model.tokenizer else model.revision


def on_hub(path: str) -> bool:
    """Whether the path of a model in a job is a name on the Hugging Face hub: folders are absolute there."""
    return bool(path) and not path.startswith(("/", ".", "~")) and not is_remote(path) and not os.path.exists(path)


def inspect(
    folder: Path,
    *,
    tokenizer_elsewhere: bool = False,
    trust_remote_code: bool = False,
    check_code: bool = True,
    classifier: bool = False,
) -> ModelFacts:
    """The facts of a folder with a causal language model, or of the one below an adapter.
    `classifier`: a reward model will do.

    `trust_remote_code`: Python code that comes with the model may run. `check_code`: False accepts a model that needs
    such code, and does not run it.

    Raises InputError with all that keeps it from being loaded: no or broken files, another kind of model, missing or
    truncated weights, no tokenizer (unless it is `tokenizer_elsewhere`), Python code that was not allowed, an adapter
    that does not fit its model.
    """
    if not folder.is_dir():
        raise InputError.of(str(folder), "is a file; give the folder" if folder.exists() else "no such folder")
    with foreign_files.made_sense_of(
        lambda why: InputError.of(str(folder), f"its files do not make sense ({why}); copy them again")
    ):
        if (adapter := adapter_in(str(folder))) is not None:
            return _below(adapter, tokenizer_elsewhere, trust_remote_code, check_code, classifier)
        return _inspected(folder, tokenizer_elsewhere, trust_remote_code or not check_code, classifier)


def _inspected(folder: Path, tokenizer_elsewhere: bool, code_allowed: bool, classifier: bool) -> ModelFacts:
    check = _Check(folder)
    config = check.config(code_allowed, classifier)
    files, tensors = check.weights()
    if tensors and not check.problems:
        check.tensors(tensors, config)
    if not tokenizer_elsewhere and not has_tokenizer(folder):
        check.refuse(
            folder, "has no tokenizer (tokenizer.json or tokenizer.model); copy it here or set model.tokenizer"
        )
    if check.problems:
        raise InputError(check.problems)
    return _info(config, files, tensors)


def _below(
    adapter: Adapter, tokenizer_elsewhere: bool, trust_remote_code: bool, check_code: bool, classifier: bool
) -> ModelFacts:
    """The facts of the model that an adapter was trained on."""
    base = Path(adapter.base)
    if adapter.classifier and not classifier:
        raise InputError.of(
            str(adapter.folder), "the adapter of a reward model is no causal language model; give a language model"
        )
    if not os.path.isdir(base):
        fetch = f" (`hf download {adapter.base}`)" if _HUB_ID.fullmatch(adapter.base) else ""
        message = (
            f"was trained on {adapter.base}, which is not here; get that model{fetch} or correct "
            "base_model_name_or_path"
        )
        raise InputError.of(str(adapter.folder / ADAPTER_CONFIG), message)
    info = inspect(
        base,
        tokenizer_elsewhere=tokenizer_elsewhere or has_tokenizer(adapter.folder),
        trust_remote_code=trust_remote_code,
        check_code=check_code,
        classifier=classifier,
    )
    problem = _misfit(adapter, base, trust_remote_code) or _unlike_halves_of_a_tie(adapter, base)
    if problem:
        raise InputError.of(str(adapter.folder), problem)
    return info


def _misfit(adapter: Adapter, base: Path, trust_remote_code: bool) -> str:
    """What of an adapter does not fit the model below it. By the names of the loaded model
    where the files have others."""
    if (method := quantization(base)) is not None:
        return (
            f"was trained on {adapter.base}, whose weights are quantized ({method}): it cannot be merged into them; "
            "correct base_model_name_or_path to the same model without quantization"
        )
    stored, loaded = tensor_shapes(base), None
    for name, shape in _adapter_shapes(adapter.folder).items():
        if not name.endswith(".lora_A.weight"):
            continue
        weight = name.replace(".lora_A.", ".")
        found = stored.get(stored_as(weight, stored) or "")
        if found is None:
            loaded = loaded if loaded is not None else loaded_shapes(base, trust_remote_code) or {}
            found = loaded.get(weight)
        if found is None or shape[1] not in found:
            if found is None and weight.endswith(TOKEN_HEADS):
                return (
                    f"has an adapter on {weight}, which is the embedding of {adapter.base}, too: it cannot be merged "
                    "into the one without the other; merge it first with PEFT into a model whose head is not tied to "
                    "the embedding"
                )
            has = "does not have" if found is None else f"has as {list(found)}, for an adapter of {shape[1]}"
            return f"is an adapter for another model: {weight}, which {adapter.base} {has}; give its own model"
    return ""


def untrainable(model: Model) -> str:
    """Why the weights in a model's folder, or below its adapter, cannot be trained,
    if that is so: they are quantized."""
    method = quantization(Path(base_of(model.path)))
    in_4_bits = model.lora is not None and model.lora.bits == 4 and method == "bitsandbytes"
    return "" if method is None or in_4_bits else described_quantization(method)


def described_quantization(method: str) -> str:
    """Why quantized weights cannot be trained, and what to do."""
    settings = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}.get(method)
    way_out = "train from the same model without quantization (model.lora.bits: 4 quantizes it while it loads)"
    if settings is not None:
        way_out += (
            ", or write that once: AutoModelForCausalLM.from_pretrained(folder, "
            f"quantization_config={settings}(dequantize=True)).save_pretrained(new_folder)"
        )
    return (
        f"the weights are quantized ({method} by quantization_config in config.json) and cannot be trained; {way_out}"
    )


def quantization(folder: Path) -> str | None:
    """How the weights in a folder are quantized, if they are."""
    try:
        settings = foreign_files.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return str(settings.get("quant_method", "unknown method")) if isinstance(settings, dict) else None


def _unlike_halves_of_a_tie(adapter: Adapter, base: Path) -> str:
    """What is wrong with an embedding or a head that was saved whole where the model below has one tensor for both."""
    named = [name for name in adapter.whole if name.endswith(".weight")]
    if not named or any(name.endswith(TOKEN_HEADS) for name in tensor_shapes(base)):
        return ""
    if len(named) == 2 and _equal_bytes(adapter.folder / ADAPTER_WEIGHTS, [PEFT_PREFIX + name for name in named]):
        return ""
    config = foreign_files.loads((adapter.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if config.get("ensure_weight_tying") and len(named) == 1:
        return ""
    return (
        f"was saved with {' and '.join(named)} whole, but {adapter.base} has one tensor for embedding and head, so "
        f"they cannot be applied apart; {merge_first(adapter.folder)}\n  with model.config.tie_word_embeddings = False "
        "before it is saved"
    )


def _equal_bytes(file: Path, names: Sequence[str]) -> bool:
    """Whether tensors of a safetensors file have the same type, shape and content."""
    import numpy as np

    tensors = _read_header(file)
    first, *rest = (tensors.get(name) for name in names)
    if first is None or any(
        other is None or (other.dtype, other.shape) != (first.dtype, first.shape) for other in rest
    ):
        return False
    content = np.memmap(file, np.uint8, mode="r")
    same = [content[each.start :][: each.bytes] for each in (first, *rest) if each is not None]
    return all(np.array_equal(same[0], other) for other in same[1:])


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def _info(config: dict[str, Any], files: Sequence[Path], tensors: dict[str, _Tensor]) -> ModelFacts:
    numbers_by_dtype: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers_by_dtype[tensor.dtype] += math.prod(tensor.shape)
    dtype = numbers_by_dtype.most_common(1)[0][0]
    return ModelFacts(
        architecture=config["architectures"][0],
        model_type=str(config.get("model_type", "")),
        num_parameters=numbers_by_dtype.total(),
        bytes=sum(tensor.bytes for tensor in tensors.values()),
        dtype=DTYPES.get(dtype, dtype),
        vocab_size=_whole(config, "vocab_size"),
        max_positions=_positions(config),
        weight_files=tuple(files),
    )


class _Check:
    """Reads a folder file by file and collects what is wrong with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[Problem] = []

    def refuse(self, file: Path, message: str) -> None:
        self.problems.append(Problem(str(file), "", message))

    def json(self, file: Path) -> Any:
        """The file's content, or None if it cannot be read."""
        try:
            return foreign_files.loads(file.read_bytes())
        except json.JSONDecodeError as error:
            self.refuse(file, f"not valid JSON in line {error.lineno}: {error.msg}; copy it again")
        except UnicodeDecodeError:
            self.refuse(file, "is not UTF-8 text; copy it again")
        except ValueError as error:
            self.refuse(file, f"not valid JSON: {error}; copy it again")
        except OSError as error:
            self.refuse(file, f"cannot be read: {error.strerror}")
        return None

    def config(self, code_allowed: bool, classifier: bool) -> dict[str, Any]:
        file = self.folder / "config.json"
        if not file.exists():
            self.refuse(self.folder, f"has no config.json{_contents(self.folder)}")
            return {}
        config = self.json(file)
        if config is None:
            return {}
        if not isinstance(config, dict):
            self.refuse(file, "expected a JSON object")
            return {}
        if problem := _wrong_kind(config, classifier) or ("" if code_allowed else _needs_its_own_code(config)):
            self.refuse(file, problem)
        return config

    def weights(self) -> tuple[list[Path], dict[str, _Tensor]]:
        """The weight files, and their tensors by name."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.exists():
            return [single], self.header(single)
        if index.exists():
            return self.indexed(index)
        if pickles := sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")]):
            self.refuse(
                self.folder,
                f"has its weights in {pickles[0].name}, a pickle, which can run code when it is loaded; convert it "
                "where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes "
                "safetensors",
            )
        else:
            gguf = next((file.name for file in sorted(self.folder.glob("*.gguf"))), None)
            way_out = (
                f"; {gguf} is for llama.cpp: get the model that it was made of" if gguf else _contents(self.folder)
            )
            self.refuse(self.folder, f"has no weights: no model.safetensors{way_out}")
        return [], {}

    def indexed(self, index: Path) -> tuple[list[Path], dict[str, _Tensor]]:
        content = self.json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            if content is not None:
                self.refuse(index, "expected a `weight_map` from tensor names to file names; copy it again")
            return [], {}
        if strays := sorted({name for name in places.values() if not is_below(name)}):
            self.refuse(index, f"names files outside of its folder: {_some(strays)}")
            return [], {}
        files = [self.folder / name for name in sorted(set(places.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            self.refuse(
                index, f"names {len(missing)} of {len(files)} files that are not there: {_some(missing)}; copy them"
            )
        found = {file.name: self.header(file) for file in files if file.exists()}
        lost = [name for name, file in places.items() if found.get(file) and name not in found[file]]
        if lost:
            self.refuse(
                index, f"names {len(lost)} tensors that their files do not hold: {_some(lost)}; copy them again"
            )
        return files, {name: tensor for tensors in found.values() for name, tensor in tensors.items()}

    def header(self, file: Path) -> dict[str, _Tensor]:
        """The tensors that a safetensors file promises; empty if the file is not whole."""
        try:
            return _read_header(file)
        except OSError as error:
            self.refuse(file, f"cannot be read: {error.strerror}")
        except ValueError as error:
            self.refuse(file, str(error))
        return {}

    def tensors(self, tensors: dict[str, _Tensor], config: dict[str, Any]) -> None:
        """Checks that the tensors are those of a whole language model of this configuration."""
        vocab_size = _whole(config, "vocab_size")
        embeddings = _embeddings({name: tensor.shape for name, tensor in tensors.items()}, vocab_size)
        if not embeddings:
            self.refuse(
                self.folder, f"its weights have no token embedding; the first tensors are {_some(sorted(tensors))}"
            )
        elif vocab_size and tensors[embeddings[0]].shape[:1] != (vocab_size,):
            rows = tensors[embeddings[0]].shape[0]
            self.refuse(
                self.folder / "config.json",
                f"says vocab_size {vocab_size:,}, but the weights' {embeddings[0]} has {rows:,} rows; they do not "
                "belong together",
            )
        num_layers = _whole(config, "num_hidden_layers", "n_layer") or 0
        if num_layers > _MOST_LAYERS:
            self.refuse(self.folder / "config.json", f"{num_layers:,} layers are out of all proportion; copy it again")
            return
        present = {int(match[1]) for name in tensors if (match := LAYER.search(name))}
        if absent := sorted(set(range(num_layers)) - present):
            counted = f"{len(absent)} of {num_layers} layers: {_some(map(str, absent))}"
            self.refuse(self.folder, f"its weights lack {counted}; copy them again or correct config.json")


def _wrong_kind(config: dict[str, Any], classifier: bool) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return "says no `architectures`; expected one such as LlamaForCausalLM"
    name = str(architectures[0])
    if name.endswith(CAUSAL_SUFFIXES) or (classifier and name.endswith(CLASSIFIER_SUFFIX)):
        return ""
    kind = " (a reward model, or another classifier)" if name.endswith(CLASSIFIER_SUFFIX) else ""
    return f"{name}{kind} is not a causal language model; expected an architecture such as LlamaForCausalLM"


def _needs_its_own_code(config: dict[str, Any]) -> str:
    """Many published folders keep an `auto_map` from the time before transformers knew the model:
    those need no code."""
    if "auto_map" not in config or _known_to_transformers(str(config.get("model_type", ""))):
        return ""
    return (
        "the model needs Python code that comes with it (`auto_map`); if you trust it, set model.trust_remote_code: "
        "true (generate, eval, critique: --trust-remote-code)"
    )


def _known_to_transformers(model_type: str) -> bool:
    """Looks for the model's package on disk: importing transformers would take seconds."""
    spec = find_spec("transformers")
    if not model_type.replace("-", "_").isidentifier() or spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir()


def _read_header(file: Path) -> dict[str, _Tensor]:
    """Reads the format's 8-byte length and JSON header, and compares with the file's size.
    ValueError says what is wrong."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError("is a Git LFS pointer instead of the weights; run `git lfs pull` in the folder")
        length = int.from_bytes(start, "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise ValueError(f"is no safetensors file ({size:,} bytes); copy it again")
        if 8 + length > size:
            raise ValueError(f"its header alone has {8 + length:,} bytes, the file has {size:,}: copy it again")
        raw = stream.read(length)
    try:
        tensors = dict(_tensors(foreign_files.loads(raw), 8 + length))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its header is malformed; copy it again") from None
    end = max((tensor.start + tensor.bytes for tensor in tensors.values()), default=0) - 8 - length
    if not tensors:
        raise ValueError("holds no tensors")
    if 8 + length + end != size:
        raise ValueError(f"header promises {8 + length + end:,} bytes, the file has {size:,}: copy it again")
    return tensors


def _tensors(entries: dict[str, Any], data: int) -> Iterator[tuple[str, _Tensor]]:
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if any(type(size) is not int or size < 0 for size in (*shape, first, last)):
            raise ValueError
        if 8 * (last - first) != math.prod(shape) * _BITS.get(dtype, 8 * (last - first) // max(1, math.prod(shape))):
            raise ValueError
        yield name, _Tensor(dtype, shape, last - first, data + first)


def described_holes(absent: Sequence[str], misfits: Sequence[str]) -> list[str]:
    """What is wrong with weights that lack tensors, or have them in another shape than the configuration says."""
    cases = ((absent, "not in the weights"), (misfits, "of another shape than config.json says"))
    return [
        f"{_some(names, 3)} {'is' if len(names) == 1 else 'are'} {what}; copy the model again or correct config.json"
        for names, what in cases
        if names
    ]


def notes_on(path: str) -> list[str]:
    """What a user should know of what in the folder of a model, or of the one below an adapter, has no effect."""
    folder = Path(base_of(path))
    try:
        config = foreign_files.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(config, dict):
        return []
    return [note for note in (_unused_layers(config, tensor_shapes(folder)), auxiliary_loss(config)) if note]


def _unused_layers(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Of layers in the weights that config.json does not count, in words; nothing if there are none."""
    count = _whole(config, "num_hidden_layers", "n_layer")
    embeddings = _embeddings(shapes, None)
    if count is None or not embeddings:
        return ""
    body = EMBEDDING.sub("", embeddings[0])
    found = (_LAYER_OF_BODY.match(name.removeprefix(body)) for name in shapes if name.startswith(body))
    count += _whole(config, "num_nextn_predict_layers") or 0
    beyond = sorted({int(match[1]) for match in found if match is not None and int(match[1]) >= count})
    if not beyond:
        return ""
    return (
        f"config.json counts {count} layers, and the weights have more: layers {_some(map(str, beyond))} are not used; "
        "correct num_hidden_layers unless that is meant"
    )


def auxiliary_loss(config: Mapping[str, Any]) -> str:
    """That a loss of routers which the configuration switches on is not learnt, in words; nothing if there is none."""
    weight = config.get("router_aux_loss_coef")
    if not weight or not config.get("output_router_logits"):
        return ""
    return (
        f"the loss is that of the tokens alone: router_aux_loss_coef {weight:g}, which output_router_logits switches "
        "on in transformers (config.json), has no effect"
    )


def window_of(path: str) -> int | None:
    """How many positions the model in a folder was made for, if it says."""
    try:
        config = foreign_files.loads((Path(base_of(path)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _positions(config) if isinstance(config, dict) else None


def _positions(config: dict[str, Any]) -> int | None:
    return _whole(config, "max_position_embeddings", "n_positions")


def _whole(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"; the folder holds {_some(names)}" if names else "; the folder is empty"


def _some(names: Any, most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def at_hand(phase: Phase, cache: Path) -> Phase:
    """The phase with its model as a local folder, copied into `cache` if it lies in a bucket."""
    if not is_remote(phase.model.path):
        return phase
    folder = local_copy(open_storage(phase.model.path), cache)
    return phase.model_copy(update={"model": phase.model.model_copy(update={"path": str(folder)})})
