"""Generates the responses of an iteration: the rollout role, and what the policy uses where it generates itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.config import PPO
from training.data.order import Order
from training.data.phase_data import Stores
from training.data.render import Renderer, tokenizer_for
from training.data.turn_end import stop_tokens
from training.engine.engine import computed, device_of
from training.estimate.model_traits import traits_of
from training.estimate.transformers_compat import attention_in_use
from training.generation.sampling import Continued, Sampling, generate_all
from training.models import loading as models
from training.process.distributed import RankInfo
from training.profiling.breakdown import GENERATION
from training.profiling.profiler import part
from training.rl.experience import Experience, Response, collated, split
from training.rl.learning_role import limits_of
from training.rl.modules import PolicyLoss
from training.rl.shared_base import at_once
from training.rl.weights import Weights, unpacked
from training.roles.learner import Learner
from training.seeding import seed_for


class Prompts:
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
    if phase.generation == "batched" or not traits_of(lm).batches_continuously(attention_in_use(lm), longest):
        return partial(generate_all, batch=phase.generation_batch)
    from training.generation import continuous_batching  # takes seconds to import

    return continuous_batching.generate_all


class Rollout:
    """A copy of the policy that writes the responses, whole on every worker."""

    def __init__(self, rank_info: RankInfo, phase: PPO, cache: str):
        self.rank_info, self.phase, self.cache = rank_info, phase, Path(cache)

    def setup(self) -> None:
        """Open the prompts, load the model."""
        stores = Learner(self.rank_info, self.phase, str(self.cache)).open_data()
        self.prompts = Prompts(self.phase, stores)
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
