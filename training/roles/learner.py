"""What every role that learns has in common: an engine, its share of every checkpoint, the memory that it takes.

Knows no data and no loss. Several learners may share a checkpoint: each keeps to parameters under its own prefix.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.checkpoint.async_writer import ShardWriter
from training.checkpoint.format import OPTIMIZER, WEIGHTS, CheckpointError, File, Reader
from training.config import Phase
from training.data.phase_data import Stores, open_stores
from training.data.token_store import TokenStore
from training.device import device_name, is_accelerator, peak_allocated_bytes, peak_reserved_bytes, total_bytes
from training.engine.engine import Engine, Fragment, device_of
from training.errors import InputError, TrainingError
from training.estimate.memory import models_of, recomputes, setting_of
from training.estimate.model_traits import Traits
from training.estimate.parameters import shape_of
from training.model_folder import at_hand, base_of
from training.models import loading as models
from training.models import lora
from training.phase_info import PhaseInfo
from training.process import heartbeat
from training.process.agreement import differences
from training.process.distributed import RankInfo
from training.process.memory import peak_bytes
from training.storage import open_storage, why_not_writable

GIB = 1 << 30
_PARALLEL = "TOKENIZERS_PARALLELISM"
"""The tokenizer looks at it at every call."""


class Learner:
    """One worker's part of a role that learns. A subclass begins with `start` and asks `engine` for steps."""

    role = "trainer"
    """Names its shards."""
    prefix = ""
    """Before the names of its parameters in checkpoints."""
    adapter = lora.NAME
    """What its adapters are called in the model, which may hold those of other roles as well."""

    def __init__(self, rank_info: RankInfo, phase: Phase, cache: str):
        self.rank_info = rank_info
        self.phase = phase
        self.whole_phase = phase
        """With the models of all roles: what they share a device with counts where memory is planned."""
        self.cache = Path(cache)
        self.dtype = models.resolve_dtype(phase.model.dtype, rank_info.device)
        self.writer = ShardWriter(pinned=is_accelerator(rank_info.device))
        self.data_damage: tuple[str, ...] = ()
        """What was wrong with tokenized data that this worker has made anew."""
        self.known: Traits | None = None
        """Of the model's code; of a role that opens data, and the same on all workers."""

    def open_data(self) -> Stores:
        """The data of the phase; its model then is on this machine, too. Raises TrainingError unless all workers see
        the same data and compute alike: else their deals would differ."""
        # The first worker of a node prepares what its node does not have yet, and verifies the rest;
        # the others then find it there.
        if self.rank_info.local_rank == 0:
            with _tokenizer_on_all_cores():
                self.data_damage = tuple(open_stores(self.phase, self.cache).damage)
            at_hand(self.phase, self.cache)
        dist.barrier()
        self.phase = self.whole_phase = at_hand(self.phase, self.cache)
        stores = open_stores(self.phase, self.cache, verify=False)
        self.traits = self.known = models.resolve_traits(self.phase.model)
        self.attention = models.resolve_attention(self.phase.model, self.rank_info.device)
        self.kernels = models.resolve_kernels(
            self.phase.model.model_copy(update={"path": base_of(self.phase.model.path)}), self.rank_info.device
        )
        self._compare_with_others(stores)
        return stores

    def _compare_with_others(self, stores: Stores) -> None:
        values = {
            "training data": stores.train.folder.name,
            "held-out data": stores.eval.folder.name if stores.eval is not None else "",
            "precision": str(self.dtype),
            "attention": self.attention,
            "kernels": self.kernels,
            "model code": json.dumps(asdict(self.traits), sort_keys=True),
        }
        if found := differences(values, device_of(self.rank_info)):
            raise TrainingError(
                f"the workers do not agree: {'; '.join(found)}; give all machines the same files and packages"
            )

    def start(self, build: Callable[[torch.dtype], nn.Module]) -> None:
        """Load the module, which holds its model as `lm`, and begin with it."""
        self.phase = with_recomputing(self.phase, self._recomputes())
        self.engine = Engine(build, self.phase, self.rank_info, self.dtype)

    def info(self, store: TokenStore, **more: Any) -> PhaseInfo:
        """What the phase turned out to be, after `start`. `more`: what depends on the role."""
        return PhaseInfo(
            mean_tokens=store.meta.tokens / len(store),
            num_parameters=self.num_parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            attention=self.attention,
            kernels=self.kernels,
            recomputes=self.phase.model.gradient_checkpointing is True,
            device=self.device_name,
            data_hash=store.folder.name,
            data_hash_before=store.meta.hash_before,
            data_changes=tuple(store.meta.changes),
            data_damage=self.data_damage,
            chats=store.meta.chats,
            **more,
        )

    def _recomputes(self) -> bool:
        """Whether activations are recomputed. The smallest GPU decides
        for all workers: under ZeRO-3 they gather weights together."""
        asked = self.whole_phase.model.gradient_checkpointing
        if asked != "auto" or self.rank_info.device == "cpu":
            return asked is True
        device = device_of(self.rank_info)
        memory = torch.tensor(float(total_bytes(device)), device=device)
        dist.all_reduce(memory, dist.ReduceOp.MIN)
        return recomputes_on(self.whole_phase, self.role, self.rank_info.size, self.dtype, float(memory), self.known)

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """For the length of a block the language model with all its weights, as they are now, to generate with."""
        return self.engine.whole_model(lambda dtype: models.skeleton(self.phase, dtype, self.rank_info.device))

    @property
    def num_parameters(self) -> int:
        """That are trained."""
        return sum(math.prod(shape) for shape in self.engine.shapes.values())

    @property
    def device_name(self) -> str:
        return device_name(device_of(self.rank_info))

    def gpu_full(self) -> float:
        """The most of its GPU's memory that this worker has taken, as a fraction; 0 without a GPU."""
        if not is_accelerator(self.rank_info.device):
            return 0.0
        return peak_reserved_bytes() / total_bytes(self.engine.device)

    def memory_gib(self) -> float:
        """The most memory that this worker has taken: of its GPU, or of its process."""
        if is_accelerator(self.rank_info.device):
            return peak_allocated_bytes() / GIB
        return peak_bytes() / GIB

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def _shard(self) -> str:
        return f"{self.role}-{self.rank_info.rank:05d}"

    def alone(self, name: str) -> str:
        """What a parameter of the model is called where no other role has adapters in it."""
        return lora.alone(name, self.adapter)

    def cannot_save_to(self, address: str) -> str | None:
        """Why this worker cannot write below an address, if it cannot."""
        return why_not_writable(open_storage(address), self._shard)

    def begin_save(self, staged: str) -> dict[str, Any]:
        """Copy this worker's share of the state and begin to write it into a staged checkpoint: the weights apart, so
        that they may stay without the optimizer's state.

        Answers with what the manifest needs to know of the state.
        """
        weights: list[tuple[str, Tensor]] = []
        moments: list[tuple[str, Tensor]] = []
        for fragment in self.engine.owned():
            for kind, view in fragment.tensors.items():
                name = f"{kind}/{self.prefix}{self.alone(fragment.name)}@{fragment.start}"
                (weights if kind == WEIGHTS else moments).append((name, view))
        self.writer.begin(
            open_storage(staged), {f"{self._shard}.safetensors": weights, f"{self._shard}{OPTIMIZER}": moments}
        )
        return {
            "optimizer_step": self.engine.optimizer_step,
            "parameters": {
                f"{self.prefix}{self.alone(name)}": list(shape) for name, shape in self.engine.shapes.items()
            },
        }

    def is_saving(self) -> bool:
        """Whether the shards are still being written."""
        return self.writer.busy

    def finish_save(self) -> list[File]:
        """Wait until the shards are written. Raises SaveError if they could not be."""
        return self.writer.finish()

    def restore(self, checkpoint: str) -> str | None:
        """Read this worker's share of a checkpoint, whatever number of workers and ZeRO stage wrote it.

        Answers with the damage that it came upon, None if all it needs was as written. The workers check every byte
        between them. When all are content, `publish` makes it the state to train on.
        """
        try:
            reader = Reader(open_storage(checkpoint), self.prefix)
            self.engine.begin_restore(reader.manifest.optimizer_steps[self.role])
            for fragment in self.engine.fragments():
                for kind, view in fragment.tensors.items():
                    self._fill(view, reader, kind, fragment)
        except CheckpointError as error:
            return str(error)
        return None

    def _fill(self, view: Tensor, reader: Reader, kind: str, fragment: Fragment) -> None:
        values = view if view.device.type == "cpu" else torch.empty(fragment.count)
        reader.read(kind, self.alone(fragment.name), fragment.start, values.numpy())
        heartbeat.progressed()
        if values is not view:
            view.copy_(values)

    def publish(self) -> None:
        """Train on from what was restored."""
        self.engine.publish()

    def get_ready(self) -> None:
        """Begin to take the memory that saving needs, beside the first steps."""
        self.writer.reserve(3 * sum(fragment.count for fragment in self.engine.owned()))  # weights and two moments

    def export(self, checkpoint: str, out: str) -> None:
        """Worker 0 writes the model of a checkpoint as a Hugging Face folder."""
        if self.rank_info.rank == 0:
            from training.checkpoint.export import export

            export(open_storage(checkpoint), open_storage(out), self.phase)


def recomputes_on(
    phase: Phase, role: str, workers: int, dtype: torch.dtype, gpu_bytes: float, known: Traits | None = None
) -> bool:
    """Whether so many workers with GPUs of this memory recompute the activations of a role
    and those that it shares them with.

    By the job and the GPUs alone, as `muster plan` tells it. They do where nothing is known of a model.
    """
    seated = phase.model_copy(
        update={"resources": phase.resources.model_copy(update={"workers": workers, "min_workers": None})}
    )
    bits: Literal["bf16", "fp32"] = "bf16" if dtype is torch.bfloat16 else "fp32"
    where = setting_of(seated, dtype=bits, on_gpu=True, known=known)
    roles = next(roles for roles, _ in phase.placements if not roles or role in roles)
    try:
        return recomputes(phase, roles, models_of(phase, shape_of), where, gpu_bytes)
    except InputError:
        return True


def with_recomputing(phase: Phase, again: bool) -> Phase:
    """The phase with `model.gradient_checkpointing` decided."""
    return phase.model_copy(update={"model": phase.model.model_copy(update={"gradient_checkpointing": again})})


@contextmanager
def _tokenizer_on_all_cores() -> Iterator[None]:
    """While the other workers of a node wait. Otherwise every worker keeps to its own thread."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ.pop(_PARALLEL)
        if before is not None:
            os.environ[_PARALLEL] = before
