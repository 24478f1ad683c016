"""Memory of one worker, worked out before there is one: what the engine holds,
what a step needs beside it, what a checkpoint takes.

The engine's facts (training/engine/engine.py under DeepSpeed) are those that tests/training/estimate/test_memory.py
measures. N parameters, of which T are trained, on W workers; b bytes a number of the computation's type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from training.config import Lora, Phase, Sharding
from training.data.batching import SDPA_VARLEN, is_varlen, limits_for
from training.device import ACCELERATOR, DeviceType, device_type, is_accelerator
from training.estimate.model_traits import Traits, attention_of, rows_of
from training.estimate.parameters import Shape
from training.model_folder import adapter_in
from training.recipes import RECIPES, resolve

FP32, BF16 = 4, 2
MOMENTS = 2 * FP32
LOGITS_AT_ONCE = 64 << 20
"""Numbers: of more the loss is computed in chunks (training/models/chunked_logits.py)."""
CACHE_ROOM = 64
"""Places that a cache of keys and values has ready (training/generation/kv_cache.py): all it
holds is copied once in so many tokens."""
_BUCKET_NUMBERS = {"cpu": 4_000_000, ACCELERATOR: 200_000_000}
"""Of a bucket of gradients, where DeepSpeed's own is of 500 million. A bucket is sent when it is full, so a smaller one
begins earlier, and leaves less to send when the backward pass is over. On a GPU 400 MB fill any link; on a CPU 16 MB
stay in the cache until they are sent, and gradients go as they come."""
_FIXED_BUCKET = 500_000_000
"""Numbers that DeepSpeed sends at once where no setting changes it."""
_NF4 = 0.53
"""Bytes a number in 4 bits, with its scales."""
_LIVE = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps at most (DeepSpeed's stage3_max_live_parameters)."""
PROCESS_BYTES = 450 << 20
"""Of host memory: a worker that has loaded torch, DeepSpeed and transformers and nothing else (measured: 0.41 GiB)."""
GPU_BASE_BYTES = 1536 << 20
"""Of a GPU's memory: CUDA's context and NCCL's buffers, which no tensor shows."""
FRAGMENTATION = 0.05
"""Of what is allocated on a GPU: what lies between the blocks."""
_COMFORT = 0.85
"""Of a GPU's memory: up to there activations are kept. These figures are right to a tenth, and a step that fails costs
more than one that takes a third longer."""


Kind = Literal["language", "policy", "classifier"]
"""What a role computes: a loss over tokens, that and an entropy, or one number a place."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a role runs, and how."""

    workers: int
    sharding: Sharding
    dtype: Literal["bf16", "fp32"]
    on_gpu: bool
    row_tokens: int
    """Places of a row of a micro-batch."""
    micro_tokens: int
    """Places of a whole micro-batch."""
    targets: float = 1.0
    """Fraction of the places that a loss is computed at."""
    lora: Lora | None = None
    checkpointing: bool = False
    eager_attention: bool = False
    masked_rows: bool = False
    """Rows with several samples, under a kernel that needs a mask for them."""

    @property
    def stage(self) -> int:
        return self.sharding.stage

    @property
    def device(self) -> DeviceType:
        return device_type(self.on_gpu)

    @property
    def bytes(self) -> int:
        """Of a number of the computation."""
        return BF16 if self.dtype == "bf16" else FP32

    @property
    def offloads(self) -> bool:
        return self.sharding.offload == "cpu" and self.on_gpu


Parts = Counter[str]
"""Bytes, by what they are for."""


@dataclass(frozen=True)
class Needs:
    """Of one worker: of its device, and of its machine's memory. Without a GPU the device is the machine."""

    device: Parts = field(default_factory=Counter)
    host: Parts = field(default_factory=Counter)

    def __add__(self, other: Needs) -> Needs:
        return Needs(self.device + other.device, self.host + other.host)


def setting_of(
    phase: Phase,
    *,
    dtype: Literal["bf16", "fp32"],
    on_gpu: bool,
    longest: int | None = None,
    targets: float | None = None,
    known: Traits | None = None,
) -> Setting:
    """How the roles of a phase compute; see `recomputes` for what it leaves open. `longest`: tokens of the longest
    sample, if it is known; `targets`: as in Setting.

    `known`: what is known of the model's code, if it was examined.
    Raises InputError for a kernel that it does not have.
    """
    device = device_type(on_gpu)
    attention: str = phase.model.attention
    if known is not None:
        attention = attention_of(phase.model, known, device)
    elif attention == "auto":
        # Flash attention, where it is installed, takes no more.
        attention = "sdpa" if on_gpu or phase.model.compile else SDPA_VARLEN
    longest = phase.max_row if longest is None else min(longest, phase.max_row)
    rows = {} if known is None else asdict(rows_of(known, attention, longest))
    limits = limits_for(phase, longest, device, attention, **rows)
    row = limits.row_tokens or longest
    # Whole rows; what a further one would not fit into is left.
    tokens = (
        limits.micro_batch * longest
        if limits.micro_batch is not None
        else max(longest, limits.micro_tokens // row * row)
    )
    return Setting(
        workers=phase.resources.workers, sharding=phase.sharding, dtype=dtype, on_gpu=on_gpu, row_tokens=row,
        micro_tokens=tokens, targets=phase.target_share if targets is None else targets,
        lora=phase.model.lora, checkpointing=phase.model.gradient_checkpointing is True,
        eager_attention=attention == "eager", masked_rows=limits.row_tokens is not None and not is_varlen(attention),
    )  # fmt: skip


def trained(shape: Shape, lora: Lora | None) -> int:
    """Parameters that are trained: those of the adapters, or all."""
    return shape.parameters if lora is None else shape.adapters(lora) + shape.whole


def bucket_numbers(count: int, device: str) -> int:
    """Size of a buffer in which gradients wait to be sent on a device, at most that of all that is trained."""
    return min(_BUCKET_NUMBERS[device], count)


def overlaps(sharding: Sharding, device: str, workers: int) -> bool:
    """Whether ZeRO-2 sends gradients beside the backward pass: a GPU has streams for it,
    and a second buffer is its price.

    ZeRO-3 does so anyway; below, gradients are sent once a step; with offload they wait for the host.
    """
    return sharding.stage == 2 and sharding.offload == "none" and is_accelerator(device) and workers > 1


def states(shape: Shape, where: Setting) -> Needs:
    """What an engine holds while it trains, gradients included.

    At stage 3 in bf16, weights, gradients and optimizer are 18 N / W; with 4 bytes for each parameter of the largest
    layer, which is gathered, that is what DeepSpeed's own `estimate_zero3_model_states_mem_needs` says.
    """
    stage, b, t = where.stage, where.bytes, trained(shape, where.lora)
    all_weights = shape.parameters + (t - shape.whole if where.lora is not None else 0)
    part = _share(t, where.workers)
    needs = Needs()
    home = needs.host if where.offloads else needs.device
    if stage == 0:
        # Weights in fp32 are the master weights; copies in bf16 last from the forward to the backward pass (autocast).
        needs.device["weights"] = FP32 * all_weights
        needs.device["gradients"] = FP32 * t
        needs.device["optimizer"] = MOMENTS * t
        if where.dtype == "bf16" and not (where.lora is not None and where.lora.bits):
            needs.device["weights in bf16"] = BF16 * (shape.multiplied + shape.idle + shape.vocab * shape.hidden)
    elif stage == 3:
        home["optimizer"] = (FP32 + MOMENTS) * part
        home["weights"] = b * _share(all_weights, where.workers)
        home["gradients"] = FP32 * part
        needs.device["a layer, gathered"] = FP32 * shape.largest
        needs.device["gradient bucket"] = b * bucket_numbers(t, where.device)
        if where.workers > 1:
            small = shape.small + (shape.small_adapters(where.lora) if where.lora is not None else 0)
            needs.device["small weights, whole"] = b * small
    else:
        home["optimizer"] = (FP32 + MOMENTS) * part
        needs.device["weights"] = b * all_weights
        if stage == 1:  # of all parameters on every worker; those of bf16 are summed in fp32
            needs.device["gradients"] = (FP32 + BF16 if where.dtype == "bf16" else FP32) * t
        else:
            home["gradients"] = FP32 * part
    if where.lora is not None and where.lora.bits == 4:
        needs.device["weights"] = int(_NF4 * shape.linear) + BF16 * (shape.parameters - shape.linear)
    return needs


def _buckets(shape: Shape, where: Setting) -> tuple[Parts, int]:
    """For gradients on their way: what stands beside activations, and copies that are made when those are gone."""
    b, t = where.bytes, trained(shape, where.lora)
    bucket, biggest = bucket_numbers(t, where.device), min(shape.biggest, t)
    beside: Parts = Counter()
    if where.stage == 0:
        return beside, FP32 * min(_FIXED_BUCKET, t)
    if where.stage == 1 and where.dtype == "bf16":
        return beside, (FP32 + BF16) * min(_FIXED_BUCKET, t)
    if where.stage < 3:
        beside["gradient bucket"] = b * bucket * (2 if overlaps(where.sharding, where.device, where.workers) else 1)
        flat = b * bucket if where.dtype == "bf16" else FP32 * _share(t, where.workers)
        return beside, max(flat + FP32 * biggest, 2 * FP32 * biggest - b * bucket)
    if where.workers > 1:  # what was gathered is kept as long as there is room by DeepSpeed's count
        beside["weights, gathered"] = max(0, b * min(shape.parameters, _LIVE) - FP32 * shape.largest)
    return beside, b * bucket + (b if where.dtype == "fp32" else FP32) * _share(bucket, where.workers)


def activations(shape: Shape, where: Setting) -> int:
    """What the forward pass of a micro-batch keeps for the backward pass: layers like LLaMA's in transformers.

    In bf16, a token of a layer: 8 hidden for each of two norms (in fp32, normalised, times the gain), 2 each for
    queries and the attention's result, 2 of their width for keys and values, 8 intermediate. In fp32, and under
    autocast, more.
    """
    hidden, b = shape.hidden, where.bytes
    autocast = where.stage == 0 and where.dtype == "bf16"
    if autocast:
        layer = 30 * hidden + 4 * shape.kv_dim + 8 * shape.intermediate
    elif where.dtype == "bf16":
        layer = 20 * hidden + 4 * shape.kv_dim + 8 * shape.intermediate
    else:
        layer = 32 * hidden + 8 * shape.kv_dim + 16 * shape.intermediate
    if where.lora is not None:
        layer -= 2 * b * hidden  # nothing is kept for the gains of the norms
    if where.eager_attention:
        layer += 6 * shape.heads * where.row_tokens
    elif where.masked_rows:
        layer += b * where.row_tokens
    outside = 0 if where.lora is not None else (8 if b == BF16 else 12) * hidden
    stream = (FP32 if autocast else b) * hidden
    layers = shape.layers * stream + layer if where.checkpointing else shape.layers * layer
    return where.micro_tokens * (layers + outside)


def logits(shape: Shape, where: Setting, kind: Kind) -> int:
    """At their most: the logits of targets, in fp32, and log-probabilities or a gradient;
    a policy's entropy beside them."""
    if kind == "classifier":
        return 0
    each = (10 if where.bytes == BF16 else 8) + (12 if kind == "policy" else 0)
    return min(int(where.micro_tokens * where.targets) * shape.vocab, LOGITS_AT_ONCE) * each


def learning(shape: Shape, where: Setting, kind: Kind) -> Parts:
    """What a step takes beside the states, at its most: in the middle, or when the gradients are sent."""
    beside, copies = _buckets(shape, where)
    beside["activations"] = activations(shape, where)
    beside["logits"] = logits(shape, where, kind)
    beside["copies of gradients"] = max(0, copies - beside["activations"] - beside["logits"])
    return +beside


def frozen(shape: Shape, where: Setting, *, sharded: bool) -> Parts:
    """A model that is only asked. Reward models are whole on every worker."""
    if sharded and where.stage == 3:
        gathered = where.bytes * min(shape.parameters, _LIVE) if where.workers > 1 else 0
        return Counter(
            {"weights": where.bytes * _share(shape.parameters, where.workers), "weights, gathered": gathered}
        )
    return Counter({"weights": (FP32 if sharded and where.stage == 0 else where.bytes) * shape.parameters})


def writing(shape: Shape, where: Setting, *, tokens: int, responses: int, batch: int, gathers: bool) -> Parts:
    """While a worker writes its share of `responses`, `batch` at a time, prompts and responses of `tokens` at most."""
    batch = max(1, min(batch, _share(responses, where.workers)))
    cache = 2 * shape.layers * shape.kv_dim * where.bytes * batch * (tokens + CACHE_ROOM)
    parts: Parts = Counter()
    parts["KV cache"] = cache + cache // max(1, shape.layers)  # a layer's grows by a copy of it
    if gathers and where.stage == 3:
        parts["weights for writing"] = where.bytes * shape.parameters
    parts["draws"] = batch * shape.vocab * (where.bytes + 3 * 8)
    return parts


def _asked(phase: Phase, shape: Shape, where: Setting) -> Parts:
    """While the questions of `phase.eval` are answered; nothing if there are none."""
    if phase.eval is None:
        return Counter()
    tokens = phase.data.max_length + phase.eval.max_new_tokens
    every_worker = phase.eval.batch * where.workers
    parts = writing(shape, where, tokens=tokens, responses=every_worker, batch=phase.eval.batch, gathers=True)
    return Counter({f"{what} (eval)": size for what, size in parts.items()})


@dataclass(frozen=True)
class Models:
    """The shapes of the models of a phase, those with a scalar head as such."""

    trained: Shape
    """What is trained; in PPO also the reference."""
    critic: Shape | None = None
    rewards: Sequence[Shape] = ()


def models_of(phase: Phase, shape_of: Callable[[str], Shape]) -> Models:
    """The models of a phase, by a function that knows the shape of each from its path."""
    shape = replace(shape_of(phase.model.path), trains_tokens=_trains_tokens(phase))
    recipe, start = RECIPES[phase.recipe], phase.critic_start
    rewards = [shape_of(source.path).as_classifier for source in phase.rewards if source.is_model]
    critic = (shape_of(start) if start else shape).as_classifier if "critic" in recipe.roles else None
    return Models(shape.as_classifier if recipe.is_classifier else shape, critic, rewards)


def _trains_tokens(phase: Phase) -> bool:
    """Whether embedding and head are trained beside adapters: where they may grow, or an adapter has brought them."""
    if phase.model.lora is None:
        return False
    adapter = adapter_in(phase.model.path)
    return phase.model.resize_embedding == "auto" or (adapter is not None and bool(adapter.whole))


def recomputes(phase: Phase, roles: Sequence[str], models: Models, where: Setting, gpu_bytes: float) -> bool:
    """Whether the learners of a group recompute activations: where the phase leaves that open,
    if a GPU has no room to keep them."""
    asked = phase.model.gradient_checkpointing
    if asked != "auto" or not where.on_gpu:
        return asked is True
    kept, again = (
        sum(team(phase, roles, models, replace(where, checkpointing=checkpointing)).device.values())
        for checkpointing in (False, True)
    )
    return again < kept and kept > _COMFORT * gpu_bytes


def team(phase: Phase, roles: Sequence[str], models: Models, where: Setting) -> Needs:
    """One worker of a group that hosts these roles of a phase (none named: all)."""
    needs: Needs = resolve(RECIPES[phase.recipe].memory)(phase, roles, models, where)
    return _with_the_rest(needs, where)


def of_trainer(phase: Phase, roles: Sequence[str], models: Models, where: Setting) -> Needs:
    """A worker whose only role is the trainer: its states, and the largest of what it does one after the other."""
    kind: Kind = "classifier" if RECIPES[phase.recipe].is_classifier else "language"
    moments = [learning(models.trained, where, kind), _asked(phase, models.trained, where)]
    most = max(moments, key=lambda parts: sum(parts.values()))
    return states(models.trained, where) + Needs(most, saving(models.trained, where))


def saving(shape: Shape, where: Setting) -> Parts:
    """The copy of a worker's share that is written while training goes on."""
    return Counter({"copy for saving": (FP32 + MOMENTS) * _share(trained(shape, where.lora), where.workers)})


def _with_the_rest(needs: Needs, where: Setting) -> Needs:
    """What no tensor shows; without a GPU all of it is the machine's memory."""
    if not where.on_gpu:
        return Needs(Counter(), needs.device + needs.host + Counter({"process": PROCESS_BYTES}))
    lost = int(FRAGMENTATION * sum(needs.device.values()))
    rest: Mapping[str, int] = {"CUDA and NCCL": GPU_BASE_BYTES, "fragmentation": lost}
    return Needs(needs.device + Counter(rest), needs.host + Counter({"process": PROCESS_BYTES}))


def _share(count: int, size: int) -> int:
    return -(-count // size)


def checkpoint_bytes(phase: Phase, models: Models) -> int:
    """Of one whole checkpoint: weights and two moments in fp32 of everything that is trained."""
    learners = [models.trained, *([models.critic] if models.critic is not None else [])]
    return sum((FP32 + MOMENTS) * trained(shape, phase.model.lora) for shape in learners)
