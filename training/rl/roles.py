"""The roles of PPO: policy and critic, which learn; the reference, which stays what the policy was; the judges, who score.

All of them compute on the shares that they are dealt (training/rl/experience.py), each with the model that its settings name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training import model as models
from training.config import PPO
from training.data.dealing import Limits
from training.data.order import Order
from training.data.render import Renderer, load_tokenizer
from training.distributed import Seat
from training.engine import Frozen
from training.errors import InputError
from training.evaluate import Exam, end_tokens, exam_of
from training.facts import Facts
from training.learner import Learner
from training.measures import Row
from training.modelfiles import tokenizer_of
from training.rl.experience import Response, Share, collated, split
from training.rl.modules import PolicyLoss, ValueLoss
from training.rl.rewards import opened
from training.sampling import Sampling, continue_all
from training.schedule import total_samples, total_steps
from training.seeding import seed_for
from training.trainer import limits_for

Micros = list[dict[str, Tensor | None]]


def limits_of(phase: PPO, seat: Seat) -> Limits:
    """What a micro-batch of prompts with their responses may hold."""
    attention = models.resolve_attention(phase.model.attention, seat.device)
    return limits_for(phase, phase.data.max_length + phase.response_tokens, seat.device, attention)


class _Learning(Learner):
    """What policy and critic have in common."""

    phase: PPO
    measures: tuple[str, ...]

    def limits(self) -> Limits:
        return limits_of(self.phase, self.seat)

    def computed(self, share: Share) -> list[NDArray[np.float32]]:
        """What the module says of the tokens of each response, [T] each, in the order of the share."""
        return split(share, self.engine.compute([collated(rows, ()) for rows in share]))

    def improve(
        self, shares: Sequence[Share], weights: Sequence[int], learning_rate: float, names: Sequence[str], beta: float
    ) -> dict[str, Any]:
        """One update of the weights for each share; `weights` are the response tokens of all workers' shares.

        Answers with the means of `measures` over each update's tokens, and its gradient norm.
        """
        sums, norms = [], []
        for share, weight in zip(shares, weights, strict=True):
            micros = [{**collated(rows, names), "beta": torch.tensor(beta)} for rows in share]
            total, norm = self.engine.step(self.fed(micros), weight=weight, learning_rate=learning_rate)
            sums.append(total)
            norms.append(float(norm))
        means = self.engine.sum_over_workers(torch.stack(sums)).cpu() / torch.tensor(weights)[:, None]
        return {
            "means": [dict(zip(self.measures, row, strict=True)) for row in means.tolist()],
            "grad_norms": norms,
            "memory_gib": self.memory_gib(),
            "gpu_full": self.gpu_full(),
        }

    def fed(self, micros: Micros) -> Micros:
        """The micro-batches as the module takes them."""
        return micros


class Policy(_Learning):
    """The language model that is improved. It knows the prompts, and answers them."""

    role = "policy"
    prefix = "policy/"
    measures = PolicyLoss.measures

    def setup(self) -> Facts:
        """Open the prompts, load the model, start the engine."""
        stores = self.open_data()
        self.store = stores.train
        self.order = Order(
            self.store.source_sizes, weights=stores.weights, seed=self.phase.seed, shuffle=self.phase.data.shuffle
        )
        self.tokenizer: Any = load_tokenizer(tokenizer_of(self.phase.model), self.phase.model.trust_remote_code)
        self.renderer = Renderer(self.tokenizer, self.phase.data.template)
        self.start(self._build)
        return Facts(
            total_steps=total_steps(self.phase, self.order.epoch_size),
            total_samples=total_samples(self.phase, self.order.epoch_size),
            num_samples=self.order.epoch_size,
            num_eval_samples=0,
            num_parameters=self.num_parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            attention=self.attention,
            device=self.device_name,
            data_hash=self.store.folder.name,
            chats=self.store.meta.chats,
            notes=self.store.meta.notes,
        )

    def _build(self, dtype: torch.dtype) -> nn.Module:
        lm: Any = models.load(self.phase, dtype, self.seat.device)
        window = getattr(lm.config, "max_position_embeddings", None)
        longest = min(self.store.meta.longest, self.phase.data.max_length) + self.phase.response_tokens
        if window is not None and longest > window:
            raise InputError.of(
                "",
                f"the longest prompt and a response of {self.phase.response_tokens} tokens come to {longest:,}, the model was made "
                f"for {window:,} positions; choose a smaller response_tokens, or data.max_length to drop long prompts",
                "response_tokens",
            )
        return PolicyLoss(lm, self.phase)

    def roll_out(self, iteration: int) -> list[Response]:
        """This worker's share of the responses to the prompts of an iteration, counted from 1."""
        phase, size = self.phase, self.phase.rollout_batch
        numbers = self.order.samples((iteration - 1) * size, iteration * size).tolist()
        asked = [
            (place, number, sample)
            for place, number in enumerate(numbers)
            for sample in range(phase.samples_per_prompt)
        ]
        mine = asked[self.seat.rank :: self.seat.size]
        prompts = [self.store[number][0] for _, number, _ in mine]
        with self.whole_model() as lm:
            ends = end_tokens(self.tokenizer, getattr(lm, "generation_config", None))
            continued = continue_all(
                lm,
                [prompt.tolist() for prompt in prompts],
                # By place, not by number: the same prompt may come twice in an iteration.
                [seed_for(phase.seed, "sample", iteration, place, sample) for place, _, sample in mine],
                ends,
                Sampling(max_new_tokens=phase.response_tokens, temperature=phase.temperature, top_p=phase.top_p),
            )
        return [
            Response(
                number=number, sample=sample, prompt=prompt, tokens=np.array([*one.tokens, *([one.end] if one.ended else [])], np.int64), ended=one.ended,
                row=self.store.row(number), text=self.renderer.text(one.tokens),
            )
            for (_, number, sample), prompt, one in zip(mine, prompts, continued, strict=True)
        ]  # fmt: skip

    def answer(self) -> dict[str, list[Row]]:
        """This worker's share of the responses to the questions of `phase.eval`, by what they are measured as."""
        with self.whole_model() as lm:
            return self._exam.responses(lm, (self.seat.rank, self.seat.size))

    @cached_property
    def _exam(self) -> Exam:
        return exam_of(self.phase, chats=self.store.meta.chats)


class Critic(_Learning):
    """A scalar head on a language model, which says what is to be expected of what stands so far."""

    role = "critic"
    prefix = "critic/"
    measures = ValueLoss.measures

    def __init__(self, seat: Seat, phase: PPO, cache: str):
        assert phase.critic is not None, "the driver says what the critic starts from"
        super().__init__(seat, with_model(phase, phase.critic), cache)

    def setup(self) -> None:
        """Load the model, start the engine."""
        self.start(
            lambda dtype: ValueLoss(models.load(self.phase, dtype, self.seat.device, classifier=True), self.phase)
        )

    def fed(self, micros: Micros) -> Micros:
        return [{name: tensor for name, tensor in micro.items() if name != "beta"} for micro in micros]


class Reference:
    """The policy as it was before it was improved."""

    def __init__(self, seat: Seat, phase: PPO, cache: str):
        self.seat = seat
        self.phase = phase.model_copy(update={"model": phase.model.model_copy(update={"lora": None})})

    def setup(self) -> None:
        """Load the model."""
        dtype = models.resolve_dtype(self.phase.model.dtype, self.seat.device)
        self.frozen = Frozen(
            lambda dtype: PolicyLoss(models.load(self.phase, dtype, self.seat.device), self.phase),
            self.phase,
            self.seat,
            dtype,
        )

    def limits(self) -> Limits:
        return limits_of(self.phase, self.seat)

    def computed(self, share: Share) -> list[NDArray[np.float32]]:
        """The log-probabilities of the tokens of each response."""
        return split(share, self.frozen.compute([collated(rows, ()) for rows in share]))


class Judges:
    """All rewards of a job. Each worker scores a part of the responses."""

    def __init__(self, seat: Seat, phase: PPO, cache: str):
        self.seat, self.phase = seat, phase

    def setup(self) -> None:
        """Load reward models, import functions."""
        self.judges = [(source.weight, opened(source, self.phase, self.seat)) for source in self.phase.rewards]

    def scores(self, responses: Sequence[Response]) -> list[float]:
        """The weighted sum of all rewards of each response."""
        totals = np.zeros(len(responses))
        for weight, judge in self.judges:
            totals += weight * np.array(judge(responses) if responses else [])
        return totals.tolist()


def with_model(phase: PPO, path: str) -> PPO:
    """The phase with another model of the same tokenizer."""
    tokenizer = tokenizer_of(phase.model)
    model = phase.model.model_copy(update={"path": str(Path(path)), "tokenizer": tokenizer})
    return phase.model_copy(update={"model": model})
