"""The role `trainer`: one worker's part in training on global batches.
Single-role recipes differ in the loss they give it.

Calls are short and answer the same on every worker, so that whoever drives the group can do anything between two of
them: evaluate, save, stop. No state but the model's and the optimizer's is kept from one step to the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import Phase
from training.data.batching import limits_for, partition_batch
from training.data.collate import collate
from training.data.order import Order
from training.data.token_store import TokenStore
from training.data.vocabulary import check_tokens, rows_in
from training.data.vocabulary import notes as vocabulary_notes
from training.errors import Diverged
from training.estimate.model_traits import notes, refuse, rows_of
from training.evaluation.accuracy import Answers
from training.evaluation.generated_answers import EvalSuite, Sitting, exam_of
from training.models import lora
from training.models.loading import notes_on_weights
from training.phase_info import PhaseInfo
from training.process import heartbeat
from training.process.distributed import RankInfo
from training.profiling.breakdown import DATA
from training.profiling.profiler import part
from training.roles.learner import Learner
from training.schedule import learning_rate, never_profiled, total_samples, total_steps
from training.seeding import seed_for

_TOLD_ROWS = 5


class Trainer(Learner):
    """Data, model and optimizer of one worker. `phase.data` must have been prepared into `cache`
    or be readable here."""

    def __init__(self, rank_info: RankInfo, phase: Phase, cache: str):
        super().__init__(rank_info, phase, cache)
        self.skipped: frozenset[int] = frozenset()
        self.own_tokens = 0

    measures: tuple[str, ...]
    """What the module returns the sums of, the loss first."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The module to train: holds the model as `lm`, returns the sums of `measures` over a
        micro-batch, [measures]."""
        raise NotImplementedError

    def weight_of(self, store: TokenStore, samples: np.ndarray) -> int:
        """What the sums over a global batch are divided by: its target tokens."""
        return int(store.target_counts[samples].sum())

    def collated(self, store: TokenStore, rows: list[list[int]]) -> dict[str, Tensor | None]:
        """A micro-batch, given as rows of sample numbers."""
        return collate([[store[sample] for sample in row] for row in rows])

    def told(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics from the means of `measures`."""
        return means

    # -- set-up --------------------------------------------------------------------------------------------------------

    def setup(self) -> PhaseInfo:
        """Open the data, load the model, start the engine."""
        self._open_data()
        self.start(self._build)
        return self.info(
            self.store,
            total_steps=self.total_steps,
            total_samples=self.total_samples,
            num_samples=self.order.epoch_size,
            num_eval_samples=len(self.eval_store) if self.eval_store is not None else 0,
            notes=[
                *self.store.meta.notes,
                *vocabulary_notes(self.phase, self.store.meta.tokenizer_rows),
                *self.left_out,
                *self._longer_than_the_model(),
                *notes(self.phase, self.traits, self.attention, self.longest),
                *never_profiled(self.phase, self.total_steps),
            ],
        )

    def _longer_than_the_model(self) -> list[str]:
        longest, positions = self.longest, self.positions
        if positions is None or longest <= positions:
            return []
        return [
            (
                f"the longest sample has {longest:,} tokens, the model was made for {positions:,} positions: set "
                f"data.max_length to {positions}"
            )
        ]

    def _open_data(self) -> None:
        stores = self.open_data()
        self.store, self.eval_store = stores.train, stores.eval
        self.order = Order(
            self.store.source_sizes, weights=stores.weights, seed=self.phase.seed, shuffle=self.phase.data.shuffle
        )
        self.total_samples = total_samples(self.phase, self.order.epoch_size)
        self.total_steps = total_steps(self.phase, self.order.epoch_size)
        self.longest = min(self.store.meta.longest, self.phase.data.max_length)
        refuse(self.phase, self.traits, self.attention, self.longest)
        rows = rows_of(self.traits, self.attention, self.longest)
        self.limits = limits_for(self.phase, self.longest, self.rank_info.device, self.attention, **asdict(rows))

    def _build(self, dtype: torch.dtype) -> nn.Module:
        module = self.build(dtype)
        lm: Any = module.lm
        self.left_out = [*lora.left_out(lm, self.phase.model.lora), *notes_on_weights(lm)]
        check_tokens(self.phase, [self.store, self.eval_store], rows_in(lm))
        self.positions: int | None = getattr(lm.config, "max_position_embeddings", None)
        return module

    def get_ready(self, skipped: frozenset[int] = frozenset()) -> None:
        """Also: leave out the batches of some steps."""
        self.skipped = skipped
        super().get_ready()

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, done: int, num_steps: int) -> dict[str, Any]:
        """Steps done+1 .. done+num_steps. Worker 0 answers with their metrics;
        every worker with its peak memory and pace.

        Raises TrainingError when a loss is not a finite number; the weights are then not to be trusted.
        """
        rows, losses = [], []
        for step in range(done + 1, done + num_steps + 1):
            heartbeat.progressed(step)
            row, loss = self._skipped(step) if step in self.skipped else self._step(step)
            rows.append(row)
            losses.append(loss)
        all_sums = self.engine.sum_over_workers(torch.stack(losses)).tolist()
        for row, sums in zip(rows, all_sums, strict=True):
            if "skipped" in row:
                continue
            row |= self._means(sums, row.pop("weight"))
            row["grad_norm"] = float(row["grad_norm"])
            self._check_finite(row)
        return {
            "rows": rows if self.rank_info.rank == 0 else [],
            "memory_gib": self.memory_gib(),
            "gpu_full": self.gpu_full(),
            "pace": self._pace(),
        }

    def _means(self, sums: Sequence[float], weight: int) -> dict[str, float]:
        return self.told({name: total / weight for name, total in zip(self.measures, sums, strict=True)})

    def _check_finite(self, row: dict[str, Any]) -> None:
        limit = math.inf if self.phase.loss_limit is None else self.phase.loss_limit
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) and row["loss"] <= limit):
            raise Diverged(
                f"step {row['step']}: the loss is {row['loss']}, the gradient norm {row['grad_norm']}: training has "
                f"diverged; the batch: {self._told(self.samples_of(row['step']).tolist())}",
                step=row["step"],
            )

    def _step(self, step: int) -> tuple[dict[str, Any], Tensor]:
        began = time.perf_counter()
        torch.manual_seed(seed_for(self.phase.seed, "step", step, self.rank_info.rank))
        rate = learning_rate(self.phase.learning_rate, self.phase.schedule, step, self.total_steps)
        with part(DATA):
            samples = self.samples_of(step)
            weight = self.weight_of(self.store, samples)
            mine = self._deal(self.store, samples)
            hand = [self.collated(self.store, rows) for rows in mine]
        self.own_tokens += sum(micro["input_ids"].numel() for micro in hand if micro["input_ids"] is not None)
        data_s = time.perf_counter() - began
        try:
            loss, norm = self.engine.step(hand, weight=weight, learning_rate=rate)
        except Exception as error:
            told = [sample for row in mine[self.engine.micro_in_hand - 1] for sample in row]
            error.add_note(f"in step {step}, with the rows {self._told(told)}")
            raise
        tokens, seconds = int(self.store.lengths_of(samples).sum()), time.perf_counter() - began
        return {
            "step": step,
            "loss": 0.0,
            "weight": weight,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "target_tokens": int(self.store.target_counts[samples].sum()),
            "samples": len(samples),
            "step_s": seconds,
            "data_s": data_s,
            "tokens_per_s": tokens / seconds,
        }, loss

    def _skipped(self, step: int) -> tuple[dict[str, Any], Tensor]:
        """A step that leaves everything as it is."""
        return {"step": step, "skipped": True}, torch.zeros(len(self.measures), device=self.engine.device)

    def samples_of(self, step: int) -> np.ndarray:
        """Numbers of the samples of a step's global batch."""
        batch = self.phase.batch
        return self.order.samples((step - 1) * batch, min(step * batch, self.total_samples))

    def _hand(self, store: TokenStore, samples: np.ndarray) -> Iterator[dict[str, Tensor | None]]:
        """This worker's micro-batches of a global batch."""
        return (self.collated(store, rows) for rows in self._deal(store, samples))

    def _deal(self, store: TokenStore, samples: np.ndarray) -> list[list[list[int]]]:
        """This worker's micro-batches: rows of sample numbers."""
        mine = partition_batch(store.lengths_of(samples).tolist(), self.rank_info.size, self.limits)[
            self.rank_info.rank
        ]
        return [[[int(samples[i]) for i in row] for row in rows] for rows in mine]

    def _told(self, samples: Sequence[int]) -> str:
        """Where samples came from: `data/sft.jsonl:42, data/sft.jsonl:7 and 3 more`."""
        first = ", ".join(self.store.where(sample) for sample in samples[:_TOLD_ROWS])
        more = len(samples) - _TOLD_ROWS
        return f"{first} and {more} more" if more > 0 else first

    def evaluate(self, first: int, count: int) -> dict[str, float]:
        """`count` batches of `data.eval` from number `first` on. With the last one, and nothing before:
        the loss, and what else the recipe measures, over all of them."""
        store, batch = self.eval_store, self.phase.batch
        assert store is not None, "there is no data to evaluate on"
        if first == 0:
            self._evaluated = torch.zeros(len(self.measures), dtype=torch.float64, device=self.engine.device)
        stop = min((first + count) * batch, len(store))
        for start in range(first * batch, stop, batch):
            samples = np.arange(start, min(start + batch, len(store)))
            self._evaluated += self.engine.evaluate(list(self._hand(store, samples)))
        if stop < len(store):
            return {}
        sums = self.engine.sum_over_workers(self._evaluated).tolist()
        means = self._means(sums, self.weight_of(store, np.arange(len(store))))
        return {f"eval_{name}": value for name, value in means.items()}

    def answer(self, limit_s: float, *, begin: bool) -> Answers:
        """More of this worker's share of the responses to the questions of `phase.eval`, for about as long."""
        if begin:
            self._sitting = Sitting(self._exam, self.whole_model, (self.rank_info.rank, self.rank_info.size))
        return self._sitting.advance(limit_s)

    @cached_property
    def _exam(self) -> EvalSuite:
        return exam_of(self.phase, chats=self.store.meta.chats)

    def _pace(self) -> float:
        """Seconds of this worker's forward passes a token, since it was last asked. 0: not known."""
        seconds, tokens = self.engine.stopwatch.read(), self.own_tokens
        self.own_tokens = 0
        return seconds / tokens if tokens and self.phase.sharding.stage < 3 else 0.0
