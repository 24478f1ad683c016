"""The roles of PPO: policy and critic, which learn; the reference,
which stays what the policy was; the judges, who score.

All of them compute on the shares that they are dealt (training/rl/experience.py),
each with the model that its settings name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.config import PPO, Model
from training.data import reward_signature
from training.data.batching import BatchLimits, limits_for
from training.data.order import Order
from training.data.phase_data import Stores, check_window
from training.data.render import Renderer, load_tokenizer, same_tokens, tokenizer_for
from training.data.turn_end import stop_tokens
from training.data.vocabulary import check_tokens, rows_in
from training.data.vocabulary import notes as vocabulary_notes
from training.engine.engine import Frozen, computed, device_of
from training.errors import InputError
from training.estimate.model_traits import notes, refuse, rows_of, traits_of
from training.evaluation.accuracy import Answers
from training.evaluation.generated_answers import EvalSuite, Sitting, exam_of
from training.generation.sampling import Continued, Sampling, generate_all
from training.model_folder import has_tokenizer, tokenizer_of, tokenizer_revision
from training.models import loading as models
from training.models import lora
from training.phase_info import PhaseInfo
from training.process.distributed import RankInfo
from training.profiling.breakdown import DATA, GENERATION
from training.profiling.profiler import part
from training.rl.experience import Experience, Response, Share, collated, split
from training.rl.modules import PolicyLoss, ValueLoss
from training.rl.rewards import opened, total
from training.rl.shared_base import at_once, policy_model, reference_model
from training.roles.learner import Learner
from training.schedule import never_profiled, total_samples, total_steps
from training.seeding import seed_for

_BUCKET_NUMBERS = 8 << 20
"""Of a piece of the weights on its way to a rollout group."""
Weights = dict[str, tuple[NDArray[Any], str]]
"""Parameters as arrays that any process can read, and their types."""


def limits_of(phase: PPO, rank_info: RankInfo) -> BatchLimits:
    """What a micro-batch of prompts with their responses may hold."""
    attention, longest = (
        models.resolve_attention(phase.model, rank_info.device),
        phase.data.max_length + phase.response_tokens,
    )
    rows = rows_of(models.resolve_traits(phase.model), attention, longest)
    return limits_for(phase, longest, rank_info.device, attention, **asdict(rows))


class _Learning(Learner):
    """What policy and critic have in common."""

    phase: PPO
    measures: tuple[str, ...]

    def limits(self) -> BatchLimits:
        return limits_of(self.phase, self.rank_info)

    def computed(self, share: Share) -> list[NDArray[np.float32]]:
        """What the module says of the tokens of each response, [T] each, in the order of the share."""
        with part(DATA):
            micros = [collated(rows, ()) for rows in share]
        return split(share, self.engine.compute(micros))

    def improve(
        self,
        shares: Sequence[Share],
        weights: Sequence[int],
        learning_rate: float,
        names: Sequence[str],
        numbers: Mapping[str, float],
    ) -> dict[str, Any]:
        """One update of the weights for each share; `weights` are the response tokens of all workers' shares.

        The module gets the facts of these names, and these numbers.
        Answers with the means of `measures` over each update's tokens, and its gradient norm.
        """
        sums, norms = [], []
        for share, weight in zip(shares, weights, strict=True):
            with part(DATA):
                of_all = {name: torch.tensor(number) for name, number in numbers.items()}
                micros = [{**collated(rows, names), **of_all} for rows in share]
            total, norm = self.engine.step(micros, weight=weight, learning_rate=learning_rate)
            sums.append(total)
            norms.append(float(norm))
        means = self.engine.sum_over_workers(torch.stack(sums)).cpu() / torch.tensor(weights)[:, None]
        return {
            "means": [dict(zip(self.measures, row, strict=True)) for row in means.tolist()],
            "grad_norms": norms,
            "memory_gib": self.memory_gib(),
            "gpu_full": self.gpu_full(),
        }


class _Prompts:
    """The prompts of a phase, and the answers that a model gives to an iteration's."""

    def __init__(self, phase: PPO, stores: Stores):
        self.phase, self.store = phase, stores.train
        self.order = Order(self.store.source_sizes, weights=stores.weights, seed=phase.seed, shuffle=phase.data.shuffle)
        tokenizer = tokenizer_for(phase.model)
        self.renderer = Renderer(tokenizer, phase.data.template, bos=phase.data.bos, in_turns=self.store.meta.chats)

    def stops(self, lm: Any, *, by_turn: bool = True) -> list[int]:
        """The tokens that end a response. `by_turn`: the end of a turn is one of them,
        if the prompts are conversations."""
        chats = by_turn and self.store.meta.chats
        return stop_tokens(self.renderer, getattr(lm, "generation_config", None), chats=chats)

    def responses(self, lm: Any, iteration: int, nth: int, share: tuple[int, int]) -> list[Response]:
        """Of the responses to the prompts of an iteration, counted from 1, those of a round,
        counted from 0: of this share (rank, size).

        A share is a stretch of them all, so the responses to one prompt have one writer, who reads it once; a round has
        those to prompts of like length.
        """
        phase, (rank, size) = self.phase, share
        batch, samples = phase.rollout_batch, phase.samples_per_prompt
        numbers = self.order.samples((iteration - 1) * batch, iteration * batch).tolist()
        asked = range(batch * samples)
        mine = list(asked[len(asked) * rank // size : len(asked) * (rank + 1) // size])
        prompts = {place: self.store[numbers[place // samples]][0] for place in mine}
        if phase.generation == "batched":
            by_length = sorted(mine, key=lambda place: (len(prompts[place]), prompts[place].tolist()))
            mine = by_length[nth * phase.generation_batch :][: phase.generation_batch]
        with part(GENERATION):
            continued = _generation(phase, lm)(
                lm,
                [prompts[place].tolist() for place in mine],
                # By place, not by number: the same prompt may come twice in an iteration.
                [seed_for(phase.seed, "sample", iteration, *divmod(place, samples)) for place in mine],
                self.stops(lm),
                Sampling(max_new_tokens=phase.response_tokens, temperature=phase.temperature, top_p=phase.top_p),
            )
        return [
            Response(
                place=place,
                number=numbers[place // samples],
                sample=place % samples,
                prompt=prompts[place],
                tokens=np.array([*one.tokens, *([] if one.end is None else [one.end])], np.int64),
                ended=one.ended,
                row=self.store.row(numbers[place // samples]),
                text=self.renderer.text(one.tokens),
            )
            for place, one in zip(mine, continued, strict=True)
        ]


def _generation(phase: PPO, lm: Any) -> Callable[..., list[Continued]]:
    longest = phase.data.max_length + phase.response_tokens
    if phase.generation == "batched" or not traits_of(lm).batches_continuously(lm.config._attn_implementation, longest):
        return partial(generate_all, batch=phase.generation_batch)
    from training.generation import continuous_batching  # takes seconds to import

    return continuous_batching.generate_all


class Policy(_Learning):
    """The language model that is improved. Unless a rollout group does, it answers the prompts itself."""

    role = "policy"
    prefix = "policy/"
    adapter = "policy"
    measures = PolicyLoss.measures

    def setup(self) -> PhaseInfo:
        """Open the prompts, load the model, start the engine."""
        self.prompts = _Prompts(self.phase, self.open_data())
        refuse(self.phase, self.traits, self.attention, self.phase.data.max_length + self.phase.response_tokens)
        self.store, self.order = self.prompts.store, self.prompts.order
        self.start(self._build)
        return PhaseInfo(
            total_steps=total_steps(self.phase, self.order.epoch_size),
            total_samples=total_samples(self.phase, self.order.epoch_size),
            num_samples=self.order.epoch_size,
            num_eval_samples=0,
            mean_tokens=self.store.meta.tokens / len(self.store),
            num_parameters=self.num_parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            attention=self.attention,
            kernels=self.kernels,
            recomputes=self.phase.model.gradient_checkpointing is True,
            device=self.device_name,
            data_hash=self.store.folder.name,
            data_hash_before=self.store.meta.hash_before,
            data_changes=tuple(self.store.meta.changes),
            data_damage=self.data_damage,
            chats=self.store.meta.chats,
            stop_tokens=self.stops[0],
            stop_tokens_before=self.stops[1],
            notes=[
                *self.store.meta.notes,
                *notes(
                    self.phase, self.traits, self.attention, self.phase.data.max_length + self.phase.response_tokens
                ),
                *vocabulary_notes(self.phase, self.store.meta.tokenizer_rows),
                *self.left_out,
                *reward_signature.notes(self.phase, self.store),
                *never_profiled(self.phase, total_steps(self.phase, self.order.epoch_size)),
            ],
        )

    def _build(self, dtype: torch.dtype) -> nn.Module:
        lm: Any
        lm, self.ready = policy_model(self.phase, dtype, self.rank_info, self.adapter)
        check_window(self.phase, self.store, getattr(lm.config, "max_position_embeddings", None))
        check_tokens(self.phase, [self.store], rows_in(lm))
        self.left_out = [*lora.left_out(lm, self.phase.model.lora), *models.notes_on_weights(lm)]
        self.stops = tuple(tuple(self.prompts.stops(lm, by_turn=by_turn)) for by_turn in (True, False))
        return PolicyLoss(lm, self.phase, self.ready)

    def roll_out(self, iteration: int, nth: int) -> list[Response]:
        """This worker's share of a round of an iteration's responses."""
        self.ready()
        with self.whole_model() as lm:
            return self.prompts.responses(lm, iteration, nth, (self.rank_info.rank, self.rank_info.size))

    def num_buckets(self) -> int:
        """In how many pieces the weights are sent to a rollout group."""
        return len(self._buckets)

    @cached_property
    def _buckets(self) -> list[list[str]]:
        """Names of the trained parameters, together of about the same size."""
        buckets: list[list[str]] = []
        room = 0
        for name, shape in self.engine.shapes.items():
            if room <= 0:
                buckets.append([])
                room = _BUCKET_NUMBERS
            buckets[-1].append(name)
            room -= math.prod(shape)
        return buckets

    def bucket(self, number: int) -> Weights | None:
        """A piece of the weights as they are now; of one worker, the others help to gather it."""
        weights = self.engine.weights(self._buckets[number])
        return (
            {self.alone(name): packed(tensor) for name, tensor in weights.items()} if self.rank_info.rank == 0 else None
        )

    def answer(self, limit_s: float, *, begin: bool) -> Answers:
        """More of this worker's share of the responses to the questions of `phase.eval`, for about as long."""
        if begin:
            self.ready()
            self._sitting = Sitting(self._exam, self.whole_model, (self.rank_info.rank, self.rank_info.size))
        return self._sitting.advance(limit_s)

    @cached_property
    def _exam(self) -> EvalSuite:
        return exam_of(self.phase, chats=self.store.meta.chats)


class Rollout:
    """A copy of the policy that writes the responses, whole on every worker."""

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        self.rank_info, self.phase, self.cache = rank_info, phase, Path(cache)

    def setup(self) -> None:
        """Open the prompts, load the model."""
        stores = Learner(self.rank_info, self.phase, str(self.cache)).open_data()
        self.prompts = _Prompts(self.phase, stores)
        dtype = models.resolve_dtype(self.phase.model.dtype, self.rank_info.device)
        self.device = device_of(self.rank_info)
        self.lm: Any = models.load(self.phase, dtype, self.rank_info.device).to(self.device).eval()
        self.parameters = dict(self.lm.named_parameters())
        self.policy = PolicyLoss(self.lm, self.phase, at_once)

    def load(self, weights: Weights) -> None:
        """Take over a piece of the policy's weights."""
        for name, values in weights.items():
            self.parameters[name].data.copy_(unpacked(*values))

    def roll_out(self, iteration: int, nth: int) -> list[Response]:
        """This worker's share of a round of an iteration's responses."""
        return self.prompts.responses(self.lm, iteration, nth, (self.rank_info.rank, self.rank_info.size))

    def log_probs(self, responses: Sequence[Response]) -> list[NDArray[np.float32]]:
        """The log-probabilities of the tokens of each response, by the weights as they are here."""
        experience = Experience(responses)
        (share,), order = experience.shard(1, limits_of(self.phase, self.rank_info))
        answers = split(share, computed(self.policy, [collated(rows, ()) for rows in share], self.device))
        experience.set("written", order, [answers])
        return experience.fields["written"]


class Critic(_Learning):
    """A scalar head on a language model, which says what is to be expected of what stands so far."""

    role = "critic"
    prefix = "critic/"
    adapter = "critic"
    measures = ValueLoss.measures

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        assert phase.critic is not None, "the driver says what the critic starts from"
        _refuse_other_tokens(phase, phase.critic)
        super().__init__(rank_info, with_model(phase, phase.critic), cache)
        self.whole_phase = phase

    def setup(self) -> None:
        """Load the model, start the engine."""
        self.start(self._build)

    def _build(self, dtype: torch.dtype) -> nn.Module:
        lm, ready = policy_model(self.phase, dtype, self.rank_info, self.adapter, classifier=True)
        return ValueLoss(lm, self.phase, ready)


def _refuse_other_tokens(phase: PPO, critic: str) -> None:
    own = tokenizer_of(Model(path=critic))
    if Path(own).is_dir() and not has_tokenizer(Path(own)):
        return  # nothing is known of it
    trust = phase.model.trust_remote_code
    if not same_tokens(load_tokenizer(own, trust), tokenizer_for(phase.model)):
        message = (
            "the critic would read the policy's tokens as others: its tokenizer is another one; start it from a model "
            "that shares the policy's"
        )
        raise InputError.of(critic, message, "critic")


class Reference:
    """The policy as it was before it was improved."""

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        self.rank_info, self.phase = rank_info, phase

    def setup(self) -> None:
        """Load the model."""
        dtype = models.resolve_dtype(self.phase.model.dtype, self.rank_info.device)
        self.frozen = Frozen(self._build, self.phase, self.rank_info, dtype)

    def _build(self, dtype: torch.dtype) -> nn.Module:
        lm, ready = reference_model(self.phase, dtype, self.rank_info)
        return PolicyLoss(lm, self.phase, ready)

    def limits(self) -> BatchLimits:
        return limits_of(self.phase, self.rank_info)

    def computed(self, share: Share) -> list[NDArray[np.float32]]:
        """The log-probabilities of the tokens of each response."""
        with part(DATA):
            micros = [collated(rows, ()) for rows in share]
        return split(share, self.frozen.compute(micros))


class RewardRole:
    """All rewards of a job. Each worker scores a part of the responses."""

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        self.rank_info, self.phase = rank_info, phase

    def setup(self) -> None:
        """Load reward models, import functions."""
        self.judges = [(source.weight, opened(source, self.phase, self.rank_info)) for source in self.phase.rewards]

    def scores(self, responses: Sequence[Response]) -> list[NDArray[np.float32]]:
        """The weighted sum of all rewards of each response. [1] each"""
        if not responses:
            return []
        scores = [(weight, judge(responses)) for weight, judge in self.judges]
        return list(total(scores, responses).astype(np.float32)[:, None])


def packed(tensor: Tensor) -> tuple[NDArray[Any], str]:
    """A tensor as an array and its type: numpy knows no bfloat16."""
    on_host = tensor.detach().cpu().contiguous()
    raw = on_host.view(torch.int16) if on_host.dtype is torch.bfloat16 else on_host
    return raw.numpy(), str(on_host.dtype).removeprefix("torch.")


def unpacked(values: NDArray[Any], dtype: str) -> Tensor:
    """The tensor again, in the array's own memory where that may be written to."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).view(getattr(torch, dtype))


def with_model(phase: PPO, path: str) -> PPO:
    """The phase with another model of the same tokenizer."""
    tokenizer = tokenizer_of(phase.model)
    changes = {"tokenizer": tokenizer, "tokenizer_revision": tokenizer_revision(phase.model)}
    model = phase.model.model_copy(update={"path": str(Path(path)), **changes})
    return phase.model_copy(update={"model": model})
