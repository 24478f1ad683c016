"""The role `policy`: the language model that is improved."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import nn

from training.data import reward_signature
from training.data.phase_data import check_window
from training.data.vocabulary import check_tokens, rows_in
from training.data.vocabulary import notes as vocabulary_notes
from training.estimate.model_traits import notes, refuse
from training.evaluation.accuracy import Answers
from training.evaluation.generated_answers import EvalSuite, Sitting, exam_of
from training.models import loading as models
from training.models import lora
from training.phase_info import PhaseInfo
from training.rl.experience import Response
from training.rl.learning_role import LearningRole
from training.rl.modules import PolicyLoss
from training.rl.rollout import Prompts
from training.rl.shared_base import policy_model
from training.rl.weights import Weights, packed
from training.schedule import never_profiled, total_samples, total_steps

_BUCKET_NUMBERS = 8 << 20
"""Of a piece of the weights on its way to a rollout group."""


class Policy(LearningRole):
    """The language model that is improved. Unless a rollout group does, it answers the prompts itself."""

    role = "policy"
    prefix = "policy/"
    adapter = "policy"
    measures = PolicyLoss.measures

    def setup(self) -> PhaseInfo:
        """Open the prompts, load the model, start the engine."""
        self.prompts = Prompts(self.phase, self.open_data())
        refuse(self.phase, self.traits, self.attention, self.phase.data.max_length + self.phase.response_tokens)
        self.store, self.order = self.prompts.store, self.prompts.order
        self.start(self._build)
        return self.info(
            self.store,
            total_steps=total_steps(self.phase, self.order.epoch_size),
            total_samples=total_samples(self.phase, self.order.epoch_size),
            num_samples=self.order.epoch_size,
            num_eval_samples=0,
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
