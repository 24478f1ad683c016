"""A small copy of a model: the same class and the same structure, with every size made small and the weights random.

What a model does to a row (does one sample see another, does padding matter) depends on its code and on the pattern of
its layers, not on its sizes. The sizes are found by the names that configurations give them; all other settings stay as
they are.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from training.seeding import seed_for

VOCABULARY = 128
ORDINARY_TOKENS = range(3, 120)
"""Token ids that no setting of a small copy names as special."""
POSITIONS = 64
WINDOW = 8
"""Tokens of a sliding window, a chunk, or a block; shorter than the long samples of a probe
and longer than the short ones."""
ROTARY_LIMIT = 12
"""Tokens after which rotary factors that depend on the length change; also between short and long samples."""
_HIDDEN, _HEADS, _HEAD_DIM, _WIDE_HEAD_DIM = 32, 4, 8, 16
_MOST_LAYERS = 8

Sizes = dict[str, Any]

_HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "embedding_dim", "emb_dim")
_LAYER_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
_OTHER_LAYER_NAMES = ("encoder_layers", "num_encoder_layers", "num_layers_per_stack")
_HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
_OTHER_HEAD_NAMES = (
    "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads",
    "linear_num_heads", "index_n_heads",
)  # fmt: skip
_KV_HEAD_NAMES = (
    "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_query_groups",
    "encoder_num_key_value_heads", "num_attention_groups",
)  # fmt: skip
_WIDTHS = re.compile(
    r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|ff_dim|d_ff|dff|dim_ff|n_inner|inner_dim|"
    r"feed_forward_size|embedding_size|"
    r"word_embed_proj_dim|lru_width|attention_hidden_size|backbone_hidden_size|d_inner|embed_dim)"
)
"""Widths that keep their ratio to the hidden size."""
_HEAD_DIMS = re.compile(r"(.*_)?(head_dim|head_size|d_head|dim_head|headdim|d_kv|kv_channels)")
_WINDOWS = re.compile(
    r"sliding_window(_size)?|attention_window_size|window_size|local_attention(_window_len)?|"
    r"attention_chunk_size|keep_window_size|"
    r"(mamba_)?chunk_size|block_size|index_block_size|rel_extent|mem_len|l(ocal|sh)_attn_chunk_length|"
    r"position_bias_max_distance|floor_scale"
)
_RANKS = re.compile(
    r"(.*_)?(lora_rank|dt_rank|time_step_rank|d_state|state_size|norm_rank|laurel_rank|adapter_rank|"
    r"lowrank|router_hidden_size|d_rel|"
    r"hidden_size_per_layer_input|prompt_mid_dim|pronunciation_embed_dim|shape_embed_dim)"
)
_POSITION_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "context_length",
    "max_target_positions", "max_source_positions", "seq_length",
)  # fmt: skip
_AT_MOST: dict[str, int] = {
    **dict.fromkeys(
        (
            "num_experts",
            "n_routed_experts",
            "num_local_experts",
            "moe_num_experts",
            "moe_num_primary_experts",
            "zero_expert_num",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("n_group", "num_expert_group", "topk_group", "n_groups", "mamba_ngroups", "mamba_n_groups", "o_groups"), 1
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("index_topk", "index_topk_blocks"), 4),
    "num_nextn_predict_layers": 1,
    "linear_num_key_heads": 2,
    "image_size": 32,
    "prompt_length": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "encoder_hash_byte_group_vocab": 64,
    "num_centroids": 16,
    "centroid_intermediate_top_k": 4,
    "query_pre_attn_scalar": _HEAD_DIM,
    "log_scaling_n_floor": WINDOW,
}
_ABSENT = {"head_dim": _HEAD_DIM, "num_key_value_heads": _HEADS}
"""What these sizes are where a configuration leaves them to the model."""
_INNER_HEADS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
_TOKEN = re.compile(r".*(token_id|_token_index|token_ids)")
_LAYER_NUMBERS = re.compile(r".*(_idxs|_indices|_layer_ids|only_layers|moe_layers)")
_PERIODS = re.compile(r".*(_period|_interval|_pattern|_every_n_layers|_step|_group_size|layer_freq)")
_FIRST_LAYERS = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|dense_layers")


def small_model(config: Any, kind: Any, attention: str, *, trust_remote_code: bool = False) -> Any:
    """A model of `kind` (an auto class) and of a configuration that `shrunk` gave, with random weights,
    in fp32 on the CPU, not training.

    The weights are always the same ones. They are larger than usual, so that attention differs from a mean.
    """
    arguments: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    own = copy.deepcopy(config)  # the model writes its kernel into it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for those that a class draws in a way of its own
        model = kind.from_config(own, attn_implementation=attention, dtype=torch.float32, **arguments)
    _randomize(model)
    return model.eval()


def _randomize(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed_for(0, "small copy", name))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else math.prod(parameter.shape[-2:-1])
                parameter.copy_(noise * (1.5 / math.sqrt(max(1, fan_in))))
            elif not parameter.any():  # a bias, an attention sink, the scale of a norm that counts from 1
                parameter.copy_(noise * 0.5)


def shrunk(config: Any, *, rotary_limit: int = ROTARY_LIMIT) -> Any:
    """The configuration of a small copy. Raises ValueError if none can be made.

    `rotary_limit`: tokens above which rotary factors change, for those that depend on the length.
    """
    plain = config.to_dict()
    computed = {name: getattr(config, name, None) for name in ("layers_block_type", "layer_types")}
    try:
        small = _small(plain, computed)
        _fit_rotary(small, plain, rotary_limit)
        made = type(config).from_dict(small)
    except Exception as error:  # the checks of a configuration raise what they like
        raise ValueError(f"no small copy can be made of {type(config).__name__}: {error}") from error
    made.use_cache = False
    return made


def _small(plain: Sizes, computed: Sizes | None = None) -> Sizes:
    """All sizes of a configuration, and of those inside it, made small.
    `computed`: what it does not store, such as the kinds of its layers."""
    hidden = next((plain[name] for name in _HIDDEN_NAMES if _is_count(plain.get(name))), None)
    small = {name: _small_value(name, value, plain, hidden) for name, value in plain.items()}
    _cut_layers(small, plain, computed or {})
    small.update({name: size for name, size in _ABSENT.items() if name in plain and plain[name] is None})
    return small


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _small_value(name: str, value: Any, plain: Sizes, hidden: int | None) -> Any:
    if isinstance(value, dict) and "model_type" in value:
        return _small(value)
    if (
        isinstance(value, list)
        and value
        and all(map(_is_count, value))
        and (_TOKEN.fullmatch(name) or _WIDTHS.fullmatch(name))
    ):
        return [_small_value(name, each, plain, hidden) for each in value]
    if not _is_count(value):
        return value
    if _TOKEN.fullmatch(name):
        return (
            value
            if value < ORDINARY_TOKENS.start
            else ORDINARY_TOKENS.stop + value % (VOCABULARY - ORDINARY_TOKENS.stop)
        )
    return next((size for rule in _RULES if (size := rule(name, value, plain, hidden)) is not None), value)


def _heads(name: str, value: int, plain: Sizes, hidden: int | None) -> int | None:
    if (
        name in _HEAD_NAMES and "state_size" in plain and name == "num_heads"
    ):  # of a state-space model: of its inner width
        return 2 * _HIDDEN // _HEAD_DIM
    if name in (*_HEAD_NAMES, *_OTHER_HEAD_NAMES):
        return _HEADS
    if name in _INNER_HEADS:
        return 2 * _HIDDEN // _HEAD_DIM
    if name == "linear_num_value_heads":
        return 4 if value > plain.get("linear_num_key_heads", 0) else 2
    return None


def _kv_heads(name: str, value: int, plain: Sizes, hidden: int | None) -> int | None:
    if name not in _KV_HEAD_NAMES:
        return None
    heads = next((plain[each] for each in _HEAD_NAMES if _is_count(plain.get(each))), value)
    return 1 if value == 1 else _HEADS if value >= heads else _HEADS // 2


def _width(name: str, value: int, plain: Sizes, hidden: int | None) -> int | None:
    if name in _HIDDEN_NAMES:
        return _HIDDEN
    if not _WIDTHS.fullmatch(name) or hidden is None:
        return None
    return max(8, min(4 * _HIDDEN, round(_HIDDEN * value / hidden / 8) * 8))


def _head_dim(name: str, value: int, plain: Sizes, hidden: int | None) -> int | None:
    heads = next((plain[each] for each in _HEAD_NAMES if _is_count(plain.get(each))), 0)
    inner = plain.get("attention_hidden_size")
    if name == "qk_head_dim":
        return 2 * _HEAD_DIM
    if name == "index_head_dim":
        return _WIDE_HEAD_DIM
    if name == "head_dim" and "qk_rope_head_dim" in plain:
        return _HEAD_DIM if value == plain["qk_rope_head_dim"] else _WIDE_HEAD_DIM
    if name == "attention_head_dim" and hidden and inner:
        return int(round(_HIDDEN * inner / hidden) // _HEADS)
    if name == "head_dim" and heads and hidden and heads * value != hidden and "state_size" not in plain:
        return _WIDE_HEAD_DIM
    return _HEAD_DIM if _HEAD_DIMS.fullmatch(name) else None


def _length(name: str, value: int, plain: Sizes, hidden: int | None) -> int | None:
    if name in _POSITION_NAMES:
        return POSITIONS
    return min(value, WINDOW) if _WINDOWS.fullmatch(name) else None


def _other(name: str, value: int, plain: Sizes, hidden: int | None) -> int | None:
    if name == "vocab_size":
        return VOCABULARY  # also of a model that has fewer tokens: a probe draws from them all
    if name.startswith("vocab_size_") or name.endswith("_vocab_size"):
        return min(value, VOCABULARY)
    if name in _OTHER_LAYER_NAMES:
        return min(value, 2)
    if name == "mamba_d_ssm":
        return 2 * _HIDDEN
    if name == "rotary_dim":
        return _HEAD_DIM // 2
    if name in _AT_MOST:
        return min(value, _AT_MOST[name])
    return min(value, _HEAD_DIM) if _RANKS.fullmatch(name) else None


_RULES: tuple[Callable[[str, int, Sizes, int | None], int | None], ...] = (
    _heads,
    _kv_heads,
    _width,
    _head_dim,
    _length,
    _other,
)


def _cut_layers(small: Sizes, plain: Sizes, computed: Sizes) -> None:
    """A few layers that hold one of each kind; in every setting that speaks of layers."""
    names = [name for name in _LAYER_NAMES if _is_count(plain.get(name))]
    if not names:
        return
    count = plain[names[0]]
    kept = _layers_to_keep(plain, computed, count)
    small.update({name: min(plain[name], len(kept)) for name in names})
    for name, value in plain.items():
        if name in names:
            continue
        if _is_layer_numbers(name, value):
            small[name] = [new for new, old in enumerate(kept) if old in value]
        elif _is_per_layer(name, value, count):
            small[name] = (
                type(value)(small[name][layer] for layer in kept)
                if isinstance(value, list)
                else "".join(value[i] for i in kept)
            )
        elif name == "per_layer_config" and isinstance(value, dict):
            small[name] = {
                f"{new:02d}": _small_part(value[f"{old:02d}"], plain)
                for new, old in enumerate(kept)
                if f"{old:02d}" in value
            }
        elif name == "attention_types":
            small[name] = [[value[0][0], max(1, len(kept) // len(value[0][0]))]]
        elif name == "num_kv_shared_layers" and _is_count(value):
            small[name] = len(kept) // 2
        elif name.endswith("layer_end_index") and _is_count(value):
            small[name] = len(kept) - 1


def _small_part(part: Sizes, plain: Sizes) -> Sizes:
    """Settings that one layer has in place of the model's."""
    return {name: value for name, value in _small({**plain, **part, "per_layer_config": None}).items() if name in part}


def _is_layer_numbers(name: str, value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(each, int) for each in value)
        and bool(_LAYER_NUMBERS.fullmatch(name))
    )


def _is_per_layer(name: str, value: Any, count: int) -> bool:
    if _LAYER_NUMBERS.fullmatch(name):
        return False
    return (isinstance(value, list) or (isinstance(value, str) and "pattern" in name)) and len(value) == count


def _layers_to_keep(plain: Sizes, computed: Sizes, count: int) -> list[int]:
    """The first layers up to one of each kind, at least two; of kinds that come late the first of each."""
    everything = {**computed, **plain}
    per_layer = [value for name, value in everything.items() if _is_per_layer(name, value, count)]
    numbered = [value for name, value in everything.items() if _is_layer_numbers(name, value)]
    cycles = [value for name, value in plain.items() if _PERIODS.fullmatch(name) and _is_count(value)]
    cycles += [len(value) for name, value in plain.items() if name == "block_types" and isinstance(value, list)]
    firsts = [value for name, value in plain.items() if _FIRST_LAYERS.fullmatch(name) and _is_count(value)]
    special = plain.get("per_layer_config") or {}

    def kind(layer: int) -> tuple[Any, ...]:
        return (
            *(str(values[layer]) for values in per_layer),
            *(layer in numbers for numbers in numbered),
            *(layer % cycle == cycle - 1 for cycle in cycles),
            *(layer < first for first in firsts),
            f"{layer:02d}" in special,
        )

    kinds = [kind(layer) for layer in range(count)]
    new = [layer for layer, each in enumerate(kinds) if each not in kinds[:layer]]
    if (
        "attention_hidden_size" in plain and "attn_layer_period" in plain
    ):  # attention shared by the layers that have it: two of them
        new += [layer for layer, each in enumerate(kinds) if kinds[:layer].count(each) == 1]
    shared = _is_count(plain.get("num_kv_shared_layers"))
    first = min(count, max([2, *(layer + 1 for layer in new if layer < _MOST_LAYERS)]) * (2 if shared else 1))
    if "attention_types" in plain:
        first += first % 2
    return [*range(first), *(layer for layer in sorted(new) if layer >= max(first, _MOST_LAYERS))]


def _fit_rotary(small: Sizes, plain: Sizes, limit: int) -> None:
    """Rotary settings whose lengths are those of the small copy, also of configurations inside this one."""
    for name, inner in plain.items():
        if isinstance(inner, dict) and "model_type" in inner:
            _fit_rotary(small[name], inner, limit)
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict):
        nested = {name: each for name, each in rope.items() if isinstance(each, dict)}
        if nested:
            small["rope_parameters"] = {
                **rope,
                **{name: _small_rope(each, small, limit) for name, each in nested.items()},
            }
        else:
            small["rope_parameters"] = _small_rope(rope, small, limit)
    if _is_count(plain.get("original_max_position_embeddings")):
        small["original_max_position_embeddings"] = limit


def _small_rope(rope: Mapping[str, Any], small: Sizes, limit: int) -> Sizes:
    made = dict(rope)
    if _is_count(made.get("original_max_position_embeddings")):
        made["original_max_position_embeddings"] = limit
    if made.get("rope_type") == "dynamic":
        small["max_position_embeddings"] = limit
    for name in ("long_factor", "short_factor"):
        if isinstance(made.get(name), list):
            numbers = _rotated(made, small)
            step = max(1, len(made[name]) // max(1, numbers))
            made[name] = (made[name][::step] * numbers)[:numbers]
    return made


def _rotated(rope: Sizes, small: Sizes) -> int:
    """Pairs of numbers of a head that are rotated."""
    of_head: int = small.get("qk_rope_head_dim") or small.get("head_dim") or _HIDDEN // _HEADS
    share: float = rope.get("partial_rotary_factor") or small.get("partial_rotary_factor") or 1.0
    return int(of_head * share) // 2
