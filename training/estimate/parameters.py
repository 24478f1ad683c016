"""What of a model decides memory and time: its parameters, by name and shape.
Read without weights, and as a rule without torch.

From the headers of safetensors where there are weights; else worked out from config.json: by formula for LLaMA's kind,
by transformers on the meta device for others; else guessed from the number of parameters, which is told.
"""

from __future__ import annotations

import math
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training import model_folder
from training.config import Lora
from training.errors import InputError
from training.io import foreign_files, hub
from training.io.http_requests import RequestError
from training.model_folder import EMBEDDING, LAYER, TOKEN_HEADS

_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Experts that lie apart in the files: in the loaded model those of a layer are one tensor, no linear layers."""
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""What older files hold beside the parameters."""
_PERSISTENT = 100_000
"""DeepSpeed's stage3_param_persistence_threshold."""
_LLAMAS_KIND = ("llama", "mistral", "qwen2")
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
_MOST_LAYERS = 10_000
_VARIANTS = ("-instruct", "-chat")
"""Of a name: models of the same shape."""
_PATIENCE_S = 5
"""For the hub, which may be out of reach."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A causal language model. Numbers count parameters; tied ones count once."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    largest: int
    """Of the module with the most parameters of its own: what ZeRO-3 gathers at least."""
    biggest: int
    """The largest single parameter."""
    head: int
    """Of the head for tokens, if it is not the embedding."""
    small: int
    """Of all parameters that are so small that ZeRO-3 leaves them whole on every worker."""
    matrices: tuple[tuple[str, int, int], ...]
    """Linear layers of the body: end of the name, outputs, inputs; one entry for each that there is."""
    multiplied: int
    """Parameters of the body that a token is multiplied with: of experts those of the ones that it goes to."""
    idle: int = 0
    """Parameters of experts that a token does not go to."""
    trains_tokens: bool = False
    """Whether embedding and head are trained beside adapters."""
    note: str = ""
    """What should be told of where this comes from."""

    @property
    def kv_dim(self) -> int:
        """Numbers of the keys of one token in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of the body, which 4 bits are for."""
        return sum(rows * columns for _, rows, columns in self.matrices)

    @property
    def whole(self) -> int:
        """Parameters that are trained beside adapters: those of embedding and head."""
        return self.vocab * self.hidden + self.head if self.trains_tokens else 0

    @property
    def as_classifier(self) -> Shape:
        """With a scalar head in place of the one for tokens."""
        return replace(self, parameters=self.parameters - self.head, head=0)

    def adapters(self, lora: Lora) -> int:
        """Parameters that adapters add."""
        return sum(self._adapters(lora))

    def small_adapters(self, lora: Lora) -> int:
        """Those of them that ZeRO-3 leaves whole."""
        return sum(size for size in self._adapters(lora) if size < _PERSISTENT)

    def _adapters(self, lora: Lora) -> list[int]:
        wanted = None if lora.targets == "all-linear" else {target.rpartition(".")[2] for target in lora.targets}
        chosen = [(rows, columns) for name, rows, columns in self.matrices if wanted is None or name in wanted]
        return [lora.rank * size for pair in chosen for size in pair]


def shape_of(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Shape:
    """The shape of the model in a folder (or below the adapter in it), or of that name on the hub, there at a revision.

    Raises InputError for a folder without config.json, and for a name that is not known and cannot be looked up.
    """
    folder = Path(model_folder.base_of(path)) if os.path.isdir(path) else Path(path)
    if os.path.isdir(folder):
        with foreign_files.made_sense_of(
            lambda why: InputError.of(
                str(folder), f"its files do not make sense ({why}); copy them again", "model.path"
            )
        ):
            return _of_folder(folder, trust_remote_code)
    if path.startswith(("/", ".", "~")):
        raise InputError.of(path, "no such folder", "model.path")
    name = path.rpartition("/")[2].lower()
    for variant in ("", *_VARIANTS):
        if (known := KNOWN.get(name.replace(variant, "", 1))) is not None:
            return of_config(known)
    return of_config(_looked_up(path, revision), trust_remote_code=trust_remote_code)


def of_count(parameters: int) -> Shape:
    """A guess at the shape of a model of so many parameters: that of a LLaMA of this size."""
    if not 10_000 <= parameters <= 10**14:
        raise InputError.of(
            "", f"{parameters:,} parameters is no size of a language model; say it as 7e9", "--parameters"
        )
    vocab = 32_000 if parameters > 10**8 else 1_000
    # Layers and width of LLaMA's models grow together: about 128 numbers of width a layer, 12 hidden^2 numbers a layer.
    hidden = max(16, round((parameters * 128 / 12) ** (1 / 3) / 16) * 16)
    layers = max(1, round((parameters - 2 * vocab * hidden) / (12 * hidden**2)))
    heads = max(1, hidden // 128)
    config = {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": round(8 * hidden / 3),
        "num_attention_heads": heads, "vocab_size": vocab,
    }  # fmt: skip
    guess = of_config(config)
    note = f"all that is known is {parameters:,} parameters; planned as a LLaMA of that size"
    return replace(guess, parameters=parameters, note=note)


def of_config(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Shape:
    """From what config.json says. Raises InputError if that is not enough."""
    if isinstance(inner := config.get("text_config"), Mapping):  # of a model that also sees
        config = {**config, **inner}
    kind = str(config.get("model_type", "llama"))
    if (layers := _number(config, "num_hidden_layers", "n_layer") or 0) > _MOST_LAYERS:
        raise InputError.of("config.json", f"{layers:,} layers are out of all proportion; copy it again", "model.path")
    absurd = [f"{name} is {config[name]!r}" for name in _SIZES if name in config and not _is_size(config[name])]
    if absurd:
        raise InputError.of(
            "config.json", f"{', '.join(absurd)}: expected whole numbers above 0; copy it again", "model.path"
        )
    if kind in _LLAMAS_KIND:
        return of_tensors(config, _of_llamas_kind(config))
    tensors = model_folder.on_meta_device(config, trust_remote_code)
    if tensors is not None:
        return of_tensors(config, tensors)
    if not _number(config, "hidden_size", "n_embd", "d_model"):
        raise InputError.of(
            "config.json",
            f"says nothing that a plan needs ({kind} is no causal language model that transformers knows); give "
            "--parameters 7e9",
            "model.path",
        )
    note = (
        f"{kind} is not known to transformers as a causal language model; planned as a LLaMA of its hidden size and "
        "number of layers"
    )
    return of_tensors(config, _of_llamas_kind(config), note)


def of_tensors(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], note: str = "") -> Shape:
    """From all parameters, and what their shapes do not say."""
    sizes = {name: math.prod(shape) for name, shape in tensors.items()}
    embedding = next((shape for name, shape in tensors.items() if EMBEDDING.search(name)), (0, 0))
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or embedding[-1]
    layers = {int(match[1]) for name in tensors if (match := LAYER.search(name))}
    heads = _number(config, "num_attention_heads", "n_head") or max(1, hidden // 64)
    head_dim = _number(config, "head_dim") or hidden // heads
    body = [
        (name.removesuffix(".weight").rpartition(".")[2], shape[0], shape[1])
        for name, shape in tensors.items()
        if len(shape) == 2 and LAYER.search(name) and not _EXPERT.search(name)
    ]
    share = _share_of_experts(config)
    matrices = {name: size for name, size in sizes.items() if len(tensors[name]) in (2, 3) and LAYER.search(name)}
    of_experts = sum(size for name, size in matrices.items() if _is_of_experts(name, tensors[name]))
    if share < 1:
        note = "; ".join(
            filter(None, [note, f"a mixture of experts: for time {share:.0%} of their weights count for a token"])
        )
    wide = [max(rows, columns) for name, rows, columns in body if max(rows, columns) > hidden and "q" not in name]
    modules: Counter[str] = Counter()
    for name, size in sizes.items():
        modules[name.rpartition(".")[0]] += size
    return Shape(
        parameters=sum(sizes.values()),
        layers=len(layers) or _number(config, "num_hidden_layers", "n_layer") or 1,
        hidden=hidden,
        intermediate=_number(config, "intermediate_size", "n_inner", "ffn_dim") or max(wide, default=4 * hidden),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab=_number(config, "vocab_size") or embedding[0],
        largest=max(modules.values(), default=0),
        biggest=max(sizes.values(), default=0),
        head=sum(size for name, size in sizes.items() if name.endswith(TOKEN_HEADS)),
        small=sum(size for size in sizes.values() if size < _PERSISTENT),
        matrices=tuple(body),
        multiplied=sum(matrices.values()) - round((1 - share) * of_experts),
        idle=round((1 - share) * of_experts),
        note=note,
    )


def _share_of_experts(config: Mapping[str, Any]) -> float:
    """Of all experts of a layer those that a token goes to; 1 without experts."""
    experts = _number(config, "num_local_experts", "n_routed_experts", "num_experts") or 1
    return min(1.0, (_number(config, "num_experts_per_tok", "num_experts_per_token") or experts) / experts)


def _is_of_experts(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 3 or ".experts." in name


def _of_folder(folder: Path, trust_remote_code: bool) -> Shape:
    file = folder / "config.json"
    try:
        config = foreign_files.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object")
    except FileNotFoundError:
        raise InputError.of(
            str(folder), "has no config.json; a plan needs no more than that file of a model", "model.path"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError.of(str(file), f"cannot be read: {error}", "model.path") from None
    tensors = model_folder.tensor_shapes(folder)
    if not tensors:
        return of_config(config, trust_remote_code=trust_remote_code)
    return of_tensors(config, {name: shape for name, shape in tensors.items() if not name.endswith(BUFFERS)})


def _of_llamas_kind(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of LLaMA, Mistral and Qwen2, which adds biases."""
    missing = [name for name in _SIZES if name not in config]
    if missing and config.get("model_type", "llama") in _LLAMAS_KIND:
        raise InputError.of("config.json", f"does not say {', '.join(missing)}; copy it again", "model.path")
    hidden = _number(config, "hidden_size", "n_embd", "d_model") or 0
    inner = _number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    heads = _number(config, "num_attention_heads", "n_head") or max(1, hidden // 64)
    head_dim = _number(config, "head_dim") or hidden // heads
    queries, keys = heads * head_dim, (_number(config, "num_key_value_heads") or heads) * head_dim
    vocab = _number(config, "vocab_size") or 0
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(_number(config, "num_hidden_layers", "n_layer") or 1):
        here = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden), ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors[f"{here}.{name}.weight"] = (rows, columns)
            if config.get("model_type") == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{here}.{name}.bias"] = (rows,)
        tensors[f"{here}.input_layernorm.weight"] = tensors[f"{here}.post_attention_layernorm.weight"] = (hidden,)
    tensors["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def holes(folder: Path, *, classifier: bool = False) -> list[str]:
    """What the weights in a folder lack of a LLaMA, Mistral or Qwen2 of its configuration, by their headers.
    Of other models nothing is known.

    `classifier`: the head for tokens is not needed.
    """
    try:
        config = foreign_files.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
        expected = _of_llamas_kind(config) if kind in _LLAMAS_KIND else {}
    except (OSError, ValueError, AttributeError, InputError):
        return []
    stored = model_folder.tensor_shapes(folder)
    if "model.embed_tokens.weight" not in stored or config.get("quantization_config"):
        return []
    wanted = {name: shape for name, shape in expected.items() if not (classifier and name.endswith(TOKEN_HEADS))}
    absent = [name for name in wanted if name not in stored]
    misfits = [name for name, shape in wanted.items() if name in stored and stored[name] != shape]
    return model_folder.described_holes(absent, misfits)


def _looked_up(name: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model on the hub, from the cache of its library if it is there."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            config: dict[str, Any] = foreign_files.loads(Path(cached).read_text(encoding="utf-8"))
            return config
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        # Not by the library's download, which tries for half a minute where there is no network.
        request = urllib.request.Request(hf_hub_url(name, "config.json", revision=revision), headers=build_hf_headers())
        config = foreign_files.loads(hub.fetch(request, _PATIENCE_S))
        return config
    except (RequestError, OSError, ValueError) as error:
        raise InputError.of(
            name,
            f"cannot be looked up on the hub ({error}); save its config.json in a folder and plan with "
            "model.path=FOLDER, or give --parameters 7e9",
            "model.path",
        ) from None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 10**8


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if type(config.get(name)) is int), None)


def _config(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, **more,
    }  # fmt: skip


_QWEN: dict[str, Any] = {"model_type": "qwen2"}
KNOWN: dict[str, dict[str, Any]] = {
    "llama-2-7b-hf": _config(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b-hf": _config(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b-hf": _config(8192, 28672, 80, 64, 8, 32000),
    "codellama-34b-hf": _config(8192, 22016, 48, 64, 8, 32000),
    "meta-llama-3-8b": _config(4096, 14336, 32, 32, 8, 128256),
    "meta-llama-3-70b": _config(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-8b": _config(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _config(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b-v0.1": _config(4096, 14336, 32, 32, 8, 32000, model_type="mistral"),
    "mistral-7b-v0.3": _config(4096, 14336, 32, 32, 8, 32768, model_type="mistral"),
    "qwen2.5-0.5b": _config(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True, **_QWEN),
    "qwen2.5-1.5b": _config(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True, **_QWEN),
    "qwen2.5-7b": _config(3584, 18944, 28, 28, 4, 152064, **_QWEN),
    "qwen2.5-math-7b": _config(3584, 18944, 28, 28, 4, 152064, **_QWEN),
    "qwen2.5-32b": _config(5120, 27648, 64, 40, 8, 152064, **_QWEN),
    "qwen2.5-72b": _config(8192, 29568, 80, 64, 8, 152064, **_QWEN),
}
"""From config.json of well-known models, by the last part of their name
in small letters: a plan of them needs no network."""
