"""Estimates the time of a step from the model, the GPUs and the links between them. Pure; one set of constants
for all.

    a step        = max(computing, sending) + (1 - OVERLAP) * min(computing, sending)
    computing     = FLOPs / (COMPUTE * what a matrix product reaches) + bytes of activations * PASSES /
                  (MEMORY * memory's bandwidth)
    sending       = bytes / (LINK or NETWORK * bandwidth of the slowest link on the way)
    a token       = max(weights + KV cache / (MEMORY * memory's bandwidth), FLOPs) + LAUNCH a layer

What they come to against published times: docs/planning.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.catalog import Machine
from training.config import Phase
from training.estimate.memory import Models, Setting, activations, checkpoint_bytes, trained
from training.estimate.parameters import Shape

COMPUTE = 0.70
"""Of what a matrix product alone reaches: what whole layers do (the rest are small kernels, norms, softmax)."""
MEMORY = 0.80
"""Of a memory's bandwidth."""
PASSES = 12
"""How often what is kept of the forward pass is written or read by kernels that do nothing else."""
LINK = 0.60
"""Of one direction of NVLink, in collectives."""
NETWORK = 0.70
"""Of a machine's network."""
OVERLAP = 0.70
"""Of sending, where there is as much to compute meanwhile."""
LAUNCH_S = {"transformers": 0.7e-3, "engine": 0.05e-3}
"""For a layer and a token, whatever its size: kernels that are started one by one, or by an engine as one graph."""
HOST_GB_S = 20.0
"""Between a GPU and its machine's memory: offloaded states, and the copy for saving."""
HOST_ADAM = 4.0e9
"""Parameters a second that the processors of a machine update, for offloaded states."""
STORAGE_GB_S = 1.0
"""That a machine writes to storage."""
START_S = 120.0
"""From gathered machines to the first step: processes, process group, and the model read at STORAGE_GB_S on top."""
LOW, HIGH = 0.75, 1.4
"""Around every time: what published runs lie within."""
POWER = 0.8
"""Of the limit of a board that training draws, on average."""
MACHINE_WATTS = 0.25
"""Of what the GPUs draw: the rest of the machine."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a phase has to do, as far as it is known."""

    rows: int | None
    """Samples of the data. None: not known."""
    tokens: float
    """Of a sample, on average; a prompt's, in PPO."""
    response: float = 0.0
    """Tokens of a response, on average."""
    note: str = ""
    """What of it is assumed."""


def flops(
    shape: Shape, where: Setting, tokens: float, length: float, *, backward: bool = True, head: float = 1.0
) -> float:
    """Of `tokens` tokens in sequences of this length, on all workers together.
    `head`: share of them that need logits."""
    dense = 2 * (shape.multiplied + head * shape.vocab * shape.hidden)
    attention = 2 * shape.layers * shape.heads * shape.head_dim * length  # causal: half of 4 L d T
    forward = dense + attention
    if not backward:
        return tokens * forward
    # Twice for the gradients; for adapters not those of the weights.
    return tokens * (forward * (2 + where.checkpointing) + (0 if where.lora is not None else dense) + attention)


def useful_flops(shape: Shape, tokens: float, length: float, *, adapters: bool = False) -> float:
    """What MFU counts: forward and backward of all weights that a token meets, nothing twice (arXiv:2204.02311).

    With adapters the weights themselves have no gradients.
    """
    attention = 6 * shape.layers * shape.heads * shape.head_dim * length
    return tokens * ((4 if adapters else 6) * (shape.parameters - shape.idle) + attention)


def computing_s(
    shape: Shape,
    where: Setting,
    machine: Machine,
    tokens: float,
    length: float,
    *,
    backward: bool = True,
    head: float = 1.0,
) -> float:
    """For all workers together to compute so much, each with one of the GPUs."""
    work = flops(shape, where, tokens, length, backward=backward, head=head)
    # Recomputed or not, forward pass by forward pass as much is written.
    kept = activations(shape, replace(where, checkpointing=False)) / where.micro_tokens / (1 if backward else 3)
    speed = COMPUTE * machine.gpu.matmul_tflops * 1e12 * _SPEED[where.on_gpu, where.dtype]
    return work / (speed * where.workers) + tokens * kept * PASSES / (
        MEMORY * machine.gpu.memory_gb_s * 1e9 * where.workers
    )


_SPEED = {(True, "bf16"): 1.0, (True, "fp32"): 0.08, (False, "fp32"): 1.0, (False, "bf16"): 1.7}
"""Of (on a GPU, type), against what the machine's figure is for: bf16 on GPUs,
fp32 (torch leaves TF32 off) on processors."""


def sending_s(shape: Shape, where: Setting, machine: Machine, micro_batches: int) -> float:
    """For what the workers send each other in a step of so many micro-batches."""
    if where.workers == 1:
        return 0.0
    share = (where.workers - 1) / where.workers
    weights, gradients = where.bytes * shape.parameters, where.bytes * trained(shape, where.lora)
    if where.stage == 3:  # weights for the forward and the backward pass of each, and its gradients
        volume = micro_batches * (2 * weights + gradients)
    elif where.stage == 2:  # gradients of each; the new weights once
        volume = micro_batches * gradients + gradients
    else:
        volume = 2 * gradients * (2 if where.dtype == "bf16" and where.stage == 0 else 1)
    return share * volume / bandwidth(machine, where.workers)


def bandwidth(machine: Machine, workers: int) -> float:
    """Bytes a second that a collective of so many workers moves for each of them."""
    inside = LINK * machine.gpu.link_gb_s / 2 * 1e9
    if workers <= machine.gpus:
        return inside
    # All workers of a machine share its network; what comes in is handed on inside.
    return min(inside, NETWORK * machine.network_gbit_s / 8 * 1e9)


def together(computing: float, sending: float) -> float:
    """Of two that overlap in part."""
    return max(computing, sending) + (1 - OVERLAP) * min(computing, sending)


def offload_s(shape: Shape, where: Setting, machine: Machine) -> float:
    """For a step of an optimizer whose states lie in host memory."""
    if not where.offloads:
        return 0.0
    mine = trained(shape, where.lora) / where.workers
    neighbours = min(where.workers, machine.gpus)
    return mine * (4 + where.bytes) / (HOST_GB_S * 1e9) + mine * neighbours / HOST_ADAM


def step_s(shape: Shape, where: Setting, machine: Machine, samples: int, length: float, *, head: float = 1.0) -> float:
    """One optimizer step over a global batch."""
    tokens = samples * length
    micro_batches = max(1, math.ceil(tokens / (where.workers * where.micro_tokens)))
    computing = computing_s(shape, where, machine, tokens, length, head=head)
    # The shares of the workers are whole samples: the fullest decides.
    uneven = math.ceil(samples / where.workers) * where.workers / samples
    return together(computing * uneven, sending_s(shape, where, machine, micro_batches)) + offload_s(
        shape, where, machine
    )


def writing_s(
    shape: Shape, machine: Machine, *, responses: float, prompt: float, response: float, copies: int,
    tensor_parallel: int = 1,
    batch: int, how: str = "transformers", bytes_each: int = 2,
) -> float:  # fmt: skip
    """For `copies` of a model, each on so many GPUs, to write all responses, `batch` at a time on each."""
    gpu = machine.gpu
    each = math.ceil(responses / copies)
    rounds, at_once = math.ceil(each / batch), min(batch, each)
    weights = bytes_each * shape.parameters / tensor_parallel
    cache = 2 * shape.layers * shape.kv_dim * bytes_each * at_once * (prompt + response / 2) / tensor_parallel
    reading = (weights + cache) / (MEMORY * gpu.memory_gb_s * 1e9)
    computing = 2 * (shape.parameters - shape.idle) * at_once / (COMPUTE * gpu.matmul_tflops * 1e12 * tensor_parallel)
    token = max(reading, computing) + LAUNCH_S[how] * shape.layers
    first = (
        2 * (shape.parameters - shape.idle) * at_once * prompt / (COMPUTE * gpu.matmul_tflops * 1e12 * tensor_parallel)
    )
    return rounds * (response * token + first)


@dataclass(frozen=True)
class Seated:
    """A group of workers of PPO, as a plan sees it."""

    roles: tuple[str, ...]
    where: Setting


def iteration_s(phase: Phase, models: Models, groups: list[Seated], machine: Machine, work: Work) -> dict[str, float]:
    """Seconds of the parts of an iteration of PPO. Roles of one group take turns; groups work at the same time."""
    rollout = phase.rollout
    assert rollout is not None, "the model writes no responses"
    responses = rollout.responses
    length = work.tokens + work.response
    head = work.response / length
    at = {role: group.where for group in groups for role in group.roles}
    writers = at.get("rollout", at["policy"])
    policy = models.trained
    parts = {"sync": 0.0}
    if "rollout" in at:
        parts["sync"] = 2 * trained(policy, phase.model.lora) / (NETWORK * machine.network_gbit_s / 8 * 1e9)
    parts["generate"] = writing_s(
        policy,
        machine,
        responses=responses,
        prompt=work.tokens,
        response=work.response,
        copies=writers.workers,
        batch=rollout.batch,
        bytes_each=writers.bytes,
    )
    if "rollout" not in at and writers.stage == 3:
        parts["generate"] += writers.bytes * policy.parameters / bandwidth(machine, writers.workers)
    asked = {
        "policy": [policy],
        "reference": [policy],
        "critic": [models.critic or policy],
        "reward": list(models.rewards),
    }

    def left(group: Seated) -> float:
        """Of a group's scoring, once all is written: where others write, it goes on beside them, a round behind."""
        seconds = sum(
            _asking_s(shape, group.where, machine, responses * length, length, head, role)
            for role in group.roles
            for shape in asked.get(role, ())
        )
        beside = 0.0 if group.where is writers or rollout.ahead else 1 - 1 / rollout.rounds(writers.workers)
        return seconds - min(seconds, parts["generate"]) * beside

    parts["score"] = max(map(left, groups))
    size = min(phase.batch, responses)
    learners = {"policy": (policy, head), "critic": (models.critic or policy, 0.0)}
    parts["learn"] = rollout.updates * max(
        sum(
            step_s(shape, group.where, machine, size, length, head=share)
            for role, (shape, share) in learners.items()
            if role in group.roles
        )
        for group in groups
    )
    if rollout.ahead:  # written while the others score and learn
        parts["generate"] = max(0.0, parts["generate"] - parts["score"] - parts["learn"])
    return parts


def _asking_s(
    shape: Shape, where: Setting, machine: Machine, tokens: float, length: float, head: float, role: str
) -> float:
    computing = computing_s(
        shape, where, machine, tokens, length, backward=False, head=head if role in ("policy", "reference") else 0.0
    )
    if where.stage < 3 or role == "reward" or where.workers == 1:
        return computing
    gathers = max(1, math.ceil(tokens / (where.workers * where.micro_tokens)))
    return together(computing, gathers * where.bytes * shape.parameters / bandwidth(machine, where.workers))


def saving_s(phase: Phase, models: Models, workers: int, machine: Machine) -> float:
    """From the request to a checkpoint that is committed: copied, then written by every machine at the same time."""
    size = checkpoint_bytes(phase, models)
    machines = math.ceil(workers / machine.gpus)
    return size / workers / (HOST_GB_S * 1e9) + size / (machines * STORAGE_GB_S * 1e9)


def starting_s(models: Models, machine: Machine) -> float:
    """From gathered machines to the first step: every machine reads the model."""
    return START_S + 2 * models.trained.parameters / (STORAGE_GB_S * 1e9)


def kilowatts(workers: int, machine: Machine) -> float:
    """That the machines draw."""
    return workers * machine.gpu.watts * POWER * (1 + MACHINE_WATTS) / 1000
