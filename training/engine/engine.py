"""One DeepSpeed engine: the step over a global batch, and the training state it holds, piece by piece.

Beside deepspeed_compat.py, which reads DeepSpeed's private state, the only file that imports DeepSpeed.
Knows nothing of data, files or recipes.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import Optimizer, Phase
from training.data.collate import to_device
from training.device import collective_backend, is_accelerator, synchronize, timing_event, torch_device
from training.engine import compiling, deepspeed_compat
from training.estimate.memory import bucket_numbers, overlaps
from training.process import heartbeat
from training.process.distributed import RankInfo, limit_waits
from training.process.memory import freed_memory_given_back
from training.profiling.breakdown import BACKWARD, FORWARD, OPTIMIZER
from training.profiling.profiler import part

MOMENTS = ("exp_avg", "exp_avg_sq")
_WRAPPER_PREFIX = "lm."


@dataclass(frozen=True)
class Fragment:
    """A stretch of one parameter that this worker holds, in fp32.

    `tensors` are 1-D views into the engine's own state, [count] each: `fp32` (master weights) and, once the optimizer
    has stepped, its moments. Writing into a view changes the state; `Engine.publish` then carries it into the model's
    weights.
    """

    name: str
    start: int
    """Place of the first element in the flattened parameter."""
    count: int
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    tensors: Mapping[str, Tensor]


def derive_config(phase: Phase, rank_info: RankInfo, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings for a phase, with the phase's raw `deepspeed:` laid over them."""
    zero: dict[str, Any] = {"stage": phase.sharding.stage}
    if phase.sharding.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": is_accelerator(rank_info.device)}
        if phase.sharding.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": is_accelerator(rank_info.device)}
    if overlaps(phase.sharding, rank_info.device, rank_info.size):
        zero["overlap_comm"] = True
    config = {
        # The micro-batches of a step differ in size and number; Muster scales the loss and marks the last one itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO the optimizer is plain torch; Muster clips for it, to know the norm.
        "gradient_clipping": (phase.clip or 0.0) if phase.sharding.stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    # ZeRO-0 keeps fp32 weights and computes in bf16 by autocast: DeepSpeed's unsharded bf16 optimizer has neither fp32
    # gradients nor a right first step.
    if dtype is torch.bfloat16 and phase.sharding.stage > 0:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _overlaid(config, phase.deepspeed)


def _overlaid(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlaid(merged[key], value) if both else value
    return merged


def parameter_groups(module: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay: none on norms, biases and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            num_dims = len(deepspeed_compat.whole_shape(parameter))
            (free if num_dims < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Engine:
    """A module under DeepSpeed.

    `build` makes the module (its language model under the attribute `lm`); it is called once, inside ZeRO-3's
    partitioned initialisation where that applies, so that no worker ever holds the whole model. What the phase leaves
    open (`model.gradient_checkpointing: auto`) is off.
    """

    def __init__(
        self, build: Callable[[torch.dtype], nn.Module], phase: Phase, rank_info: RankInfo, dtype: torch.dtype
    ):
        self.stage = phase.sharding.stage
        self.clip = phase.clip
        self.size = rank_info.size
        self.rank = rank_info.rank
        self.device = device_of(rank_info)
        config = derive_config(phase, rank_info, dtype)
        _start_deepspeed(rank_info)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=self.stage == 0 and dtype is not torch.float32)
        if self.stage == 3:
            module = _built_sharded(build, dtype, config)
        else:
            module = build(torch.float32 if self.stage == 0 else dtype).to(self.device)
        if phase.model.gradient_checkpointing is True:
            lm: Any = module.lm
            lm.activation_checkpointing_enable({"use_reentrant": False})
        self.shapes = {
            name.removeprefix(_WRAPPER_PREFIX): deepspeed_compat.whole_shape(p)
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        """Of the parameters that are trained."""
        config["zero_optimization"].setdefault(
            "reduce_bucket_size", bucket_numbers(sum(map(math.prod, self.shapes.values())), rank_info.device)
        )
        self.ds = _initialize(module, config, phase.optimizer)
        limit_waits(rank_info.timeout_s)
        self.compiles = phase.model.compile
        if self.compiles:
            compiling.compile_layers(self.ds.module.lm, rank_info.device)
        self.micro_in_hand = 0
        """Number of the micro-batch that `step` has begun last, from 1."""
        self.stopwatch = Stopwatch(self.device)
        """Of the forward passes of `step`: below ZeRO-3 a worker waits for no other in them."""

    # -- training ---------------------------------------------------------------------------------------------------

    def step(
        self, micro_batches: Sequence[Mapping[str, Tensor | None]], *, weight: int, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step over this worker's share of a global batch;
        the module returns sums, that of the loss first.

        Returns this worker's sums [measures], and the gradient norm of the whole batch []. The gradient is that of
        (sum of the loss over all workers) / weight.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed averages gradients over the workers; the loss of a global batch is a sum over them.
        scale = self.size / weight
        totals = []
        for number, micro in enumerate(micro_batches, 1):
            self.micro_in_hand = number
            self.ds.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self.stopwatch, part(FORWARD):
                sums = self._sums(micro)
            with part(BACKWARD):
                self.ds.backward(sums[0] * scale, scale_wrt_gas=False)
            totals.append(sums.detach())
            heartbeat.progressed()
        with part(OPTIMIZER):
            norm = self._norm_of_unsharded() if self.stage == 0 else None
            self.ds.step()
        return torch.stack(totals).sum(0), torch.as_tensor(
            self.ds.get_global_grad_norm() if norm is None else norm
        ).detach()

    def _sums(self, micro: Mapping[str, Tensor | None]) -> Tensor:
        with self.autocast:
            sums: Tensor = self.ds(**to_device(micro, self.device))
            return sums

    def _norm_of_unsharded(self) -> Tensor:
        """Clip and measure the gradients of ZeRO-0: DeepSpeed clips those too, but does not tell their norm."""
        limit = self.clip if self.clip is not None else float("inf")
        return nn.utils.clip_grad_norm_(self.ds.module.parameters(), limit)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
        """This worker's sums. [measures]"""
        self.ds.eval()
        totals = []
        for micro in micro_batches:
            with part(FORWARD):
                totals.append(self._sums(micro))
            heartbeat.progressed()
        self.ds.train()
        return torch.stack(totals).sum(0)

    def compute(self, micro_batches: Sequence[Mapping[str, Tensor | None]]) -> list[Tensor]:
        """What the module returns for each micro-batch, on the host."""
        self.ds.eval()
        with self.autocast:
            answers = computed(self.ds, micro_batches, self.device)
        self.ds.train()
        return answers

    @contextmanager
    def whole_model(self, skeleton: Callable[[torch.dtype], nn.Module]) -> Iterator[nn.Module]:
        """For the length of a block the language model with all its weights, as they are now, to generate with.

        Under ZeRO-3 that is a copy, gathered once, of the memory of the whole model;
        `skeleton` makes it without weights.
        """
        if self.stage < 3:
            self.ds.eval()
            try:
                with self.autocast, compiling.eagerly() if self.compiles else nullcontext():
                    yield self.ds.module.lm
            finally:
                self.ds.train()
            return
        yield self._gathered(skeleton)

    @torch.no_grad()
    def _gathered(self, skeleton: Callable[[torch.dtype], nn.Module]) -> nn.Module:
        import deepspeed

        sharded = dict(self.ds.module.lm.named_parameters())
        whole: Any = skeleton(next(iter(sharded.values())).dtype)
        for name, parameter in sharded.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.data.clone()
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
            heartbeat.progressed()
        whole.tie_weights()
        lm: nn.Module = whole.eval()
        return lm

    @torch.no_grad()
    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole parameters of the language model, as it computes with them now and until it learns.
        Every worker must ask for the same."""
        import deepspeed

        parameters = dict(self.ds.module.lm.named_parameters())
        wanted = [parameters[name] for name in names]
        with deepspeed.zero.GatheredParameters(wanted, enabled=self.stage == 3):
            # What ZeRO-3 has gathered for this block is given back after it.
            return {
                name: parameter.data.clone() if self.stage == 3 else parameter.data
                for name, parameter in zip(names, wanted, strict=True)
            }

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Element-wise sum over all workers, on all of them. [n] -> [n]"""
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    # -- state ------------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """Everything this worker holds of the training state. Together the workers hold every parameter completely."""
        if self.stage == 0:
            yield from self._of_plain_optimizer()
        elif self.stage < 3:
            yield from self._of_partitions()
        else:
            yield from self._of_sharded_weights()

    def owned(self) -> Iterator[Fragment]:
        """The fragments that this worker writes: where all workers hold the same, each writes an equal stretch."""
        for fragment in self.fragments():
            if self.stage > 0:
                yield fragment
                continue
            first = fragment.count * self.rank // self.size
            count = fragment.count * (self.rank + 1) // self.size - first
            if count:
                tensors = {kind: t.narrow(0, first, count) for kind, t in fragment.tensors.items()}
                yield Fragment(fragment.name, first, count, fragment.shape, tensors)

    def _fragment(self, parameter: Any, start: int, count: int, views: Mapping[str, Tensor]) -> Fragment:
        name = self.ds.param_names[parameter].removeprefix(_WRAPPER_PREFIX)
        return Fragment(name, start, count, self.shapes[name], views)

    def _of_plain_optimizer(self) -> Iterator[Fragment]:
        for group in self.ds.optimizer.param_groups:
            for p in group["params"]:
                yield self._fragment(p, 0, p.numel(), _views(p.data.view(-1), self.ds.optimizer.state.get(p)))

    def _of_partitions(self) -> Iterator[Fragment]:
        for parameters, flat in deepspeed_compat.partitions(self.ds.optimizer):
            for p in parameters:
                if (here := deepspeed_compat.slice_in_partition(p)) is not None:
                    views = _views(flat.data, self._inner_optimizer.state.get(flat), here.flat_start, here.count)
                    yield self._fragment(p, here.start, here.count, views)

    def _of_sharded_weights(self) -> Iterator[Fragment]:
        zero = self.ds.optimizer
        for parameters, flat in deepspeed_compat.sharded_partitions(zero):
            offset = 0
            for p in parameters:
                length, whole_length = deepspeed_compat.shard_length(p)
                start = self.rank * length
                count = max(0, min(length, whole_length - start))
                if count:
                    views = _views(flat.data, zero.optimizer.state.get(flat), offset, count)
                    yield self._fragment(p, start, count, views)
                offset += length

    @property
    def optimizer_step(self) -> int:
        """How often the optimizer has stepped: the t of its bias correction."""
        for state in self._inner_optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self.ds.optimizer if self.stage == 0 else self.ds.optimizer.optimizer
        return inner

    def begin_restore(self, optimizer_step: int) -> None:
        """Make room for the moments, so that `fragments` shows views to restore into. Then fill them and `publish`."""
        if optimizer_step == 0:
            return
        optimizer = self._inner_optimizer
        for flat in self._flat_tensors():
            optimizer.state[flat].update({kind: torch.zeros_like(flat.data) for kind in MOMENTS})
            optimizer.state[flat]["step"] = torch.tensor(float(optimizer_step), dtype=torch.float32, device=flat.device)

    def _flat_tensors(self) -> Iterator[Tensor]:
        """The tensors that the optimizer steps, which are the keys of its state."""
        if self.stage == 0:
            yield from (p for group in self.ds.optimizer.param_groups for p in group["params"])
        elif self.stage < 3:
            yield from (flat for _, flat in deepspeed_compat.partitions(self.ds.optimizer))
        else:
            yield from (flat for _, flat in deepspeed_compat.sharded_partitions(self.ds.optimizer))

    @torch.no_grad()
    def publish(self) -> None:
        """Carry restored master weights into the weights that the model computes with."""
        zero = self.ds.optimizer
        if self.stage == 0:
            return
        if self.stage < 3:
            for parameters, flat in deepspeed_compat.partitions(self.ds.optimizer):
                if state := zero.optimizer.state.get(flat):
                    for p in parameters:
                        deepspeed_compat.renew_state_views(p, flat, state)
            partitions = deepspeed_compat.partitions(zero)
            for parts, (_, flat) in zip(deepspeed_compat.weight_partitions(zero), partitions, strict=True):
                parts[self.rank].copy_(flat.data)
                # Into place: gloo's all-gather, which DeepSpeed's own function uses,
                # takes three times as long and a copy.
                for rank, part in enumerate(parts):
                    dist.broadcast(part, rank)
        else:
            deepspeed_compat.publish_shards(zero)


class Frozen:
    """A module that is never trained, sharded under ZeRO-3, computing as `Engine` does."""

    def __init__(
        self, build: Callable[[torch.dtype], nn.Module], phase: Phase, rank_info: RankInfo, dtype: torch.dtype
    ):
        stage = phase.sharding.stage
        self.device = device_of(rank_info)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=stage == 0 and dtype is not torch.float32)
        _start_deepspeed(rank_info)
        self.module: Any
        if stage == 3:
            import deepspeed

            config = derive_config(phase, rank_info, dtype)
            module = _built_sharded(build, dtype, config)
            self.module, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        else:
            self.module = build(torch.float32 if stage == 0 else dtype).to(self.device)
        self.module.eval()

    def compute(self, micro_batches: Sequence[Mapping[str, Tensor | None]]) -> list[Tensor]:
        """What the module returns for each micro-batch, on the host."""
        with self.autocast:
            return computed(self.module, micro_batches, self.device)


@torch.no_grad()
def computed(
    module: Callable[..., Tensor], micro_batches: Sequence[Mapping[str, Tensor | None]], device: torch.device
) -> list[Tensor]:
    """What a module returns for each micro-batch, on the host."""
    answers = []
    for micro in micro_batches:
        with part(FORWARD):
            answers.append(module(**to_device(micro, device)).float().cpu())
        heartbeat.progressed()
    return answers


def device_of(rank_info: RankInfo) -> torch.device:
    """The device that a worker computes on."""
    return torch_device(rank_info.device, rank_info.local_rank)


def whole(parameter: Any) -> AbstractContextManager[Any]:
    """For the length of a block the whole of a parameter that ZeRO-3 may have sharded;
    what worker 0 makes of it stays."""
    if not deepspeed_compat.is_sharded(parameter):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return gathered


class Stopwatch:
    """Adds up the seconds that blocks take on a device, without waiting for it in between."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *exc: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if is_accelerator(self._device.type):
            self._marks.append(timing_event())
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> float:
        """The seconds since the last reading. Waits for the device."""
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if not is_accelerator(self._device.type):
            return float(sum(end - start for start, end in pairs))
        synchronize(self._device)
        return float(sum(start.elapsed_time(end) for start, end in pairs) / 1000)


def _views(
    flat: Tensor, state: Mapping[str, Tensor] | None, offset: int = 0, count: int | None = None
) -> dict[str, Tensor]:
    tensors = {"fp32": flat, **{kind: state[kind].view(-1) for kind in MOMENTS if state and kind in state}}
    return {kind: t.narrow(0, offset, t.numel() if count is None else count) for kind, t in tensors.items()}


def _start_deepspeed(rank_info: RankInfo) -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of what DeepSpeed calls
    deepspeed_compat.disable_compiled_ops()
    deepspeed.init_distributed(
        dist_backend=collective_backend(rank_info.device), auto_mpi_discovery=False, verbose=False
    )


def _built_sharded(build: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, config: dict[str, Any]) -> nn.Module:
    from transformers.integrations import HfDeepSpeedConfig

    shards_while_loading = HfDeepSpeedConfig(config)  # transformers shards for as long as this object lives
    with freed_memory_given_back():
        module = build(dtype)
    del shards_while_loading
    return module


def _initialize(module: nn.Module, config: dict[str, Any], settings: Optimizer) -> Any:
    import deepspeed

    beta1, beta2 = settings.betas
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings), lr=0.0, betas=(beta1, beta2), eps=settings.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    # One of DeepSpeed's optimizers makes its states by a step with gradients of zero. With the learning rate 0 that
    # changes nothing but the count of steps, on which Adam's bias correction hangs.
    for state in optimizer.state.values():
        state["step"].zero_()
    return engine
