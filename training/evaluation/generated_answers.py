"""Evaluation by generated answers: a model answers questions, the answers are compared with the right ones.

Workers share the questions out; each writes and judges its own. What a question is answered does
not depend on who does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from training.config import Phase, Questions
from training.data import questions
from training.data.final_answers import final_answer, same, verdict
from training.data.questions import Question
from training.data.render import Renderer, Sample, tokenizer_for
from training.data.row_errors import RowError
from training.data.turn_end import stop_tokens
from training.errors import InputError, Problem
from training.evaluation.accuracy import Answers, Row
from training.generation.sampling import Continued, Sampling, in_batches
from training.seeding import seed_for

RewardScorer = Callable[[str, str], tuple[str | None, bool]]
"""From the expected answer and a response to the answer it gives, and whether that is right."""


@dataclass(frozen=True, kw_only=True)
class GenerationEval:
    """How questions are put to a model."""

    renderer: Renderer
    seed: int
    settings: Questions
    stops: list[int] | None = None
    """The tokens that end a response. None: as the renderer and the model's generation settings have it."""

    def answered(
        self, lm: Any, asked: Sequence[Question], judge: RewardScorer, share: tuple[int, int] = (0, 1)
    ) -> list[Row]:
        """The responses to questions rank, rank + size, ... for a `share` of (rank, size), judged."""
        return list(chain.from_iterable(self.answering(lm, asked, judge, share)))

    def answering(
        self, lm: Any, asked: Sequence[Question], judge: RewardScorer, share: tuple[int, int] = (0, 1)
    ) -> Iterator[list[Row]]:
        """What `answered` returns, one generated batch after the other."""
        rank, size = share
        samples = range(self.settings.samples)
        mine = [(number, sample) for number in range(rank, len(asked), size) for sample in samples]
        prompts = self._prompts([asked[number] for number, _ in mine])
        for continued in in_batches(
            lm,
            prompts,
            [seed_for(self.seed, "sample", 0, number, sample) for number, sample in mine],
            self._stop_tokens(lm),
            Sampling(
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
            ),
            batch=self.settings.batch,
            window=getattr(lm.config, "max_position_embeddings", None),
        ):
            yield [self._judged(asked, *mine[place], one, judge) for place, one in continued.items()]

    def _judged(self, asked: Sequence[Question], number: int, sample: int, one: Continued, judge: RewardScorer) -> Row:
        question, response = asked[number], self.renderer.text(one.tokens)
        answer, correct = judge(question.expected, response)
        return {
            "number": number,
            "row": question.where,
            "question": question.text,
            "expected": question.expected,
            "sample": sample,
            "response": response,
            "answer": answer,
            "correct": correct,
            "ended": one.ended,
            "tokens": len(one.tokens),
        }

    def _prompts(self, asked: Sequence[Question]) -> list[list[int]]:
        """Raises InputError for questions that the chat template refuses."""
        rendered = self.renderer.render([question.prompt for question in asked])
        refused = [
            (question, each) for question, each in zip(asked, rendered, strict=True) if isinstance(each, RowError)
        ]
        if refused:
            raise InputError([Problem(question.where, "", str(error)) for question, error in refused])
        return [each.ids.tolist() for each in rendered if isinstance(each, Sample)]

    def _stop_tokens(self, lm: Any) -> list[int]:
        if self.stops is not None:
            return self.stops
        return stop_tokens(self.renderer, getattr(lm, "generation_config", None), chats=self.renderer.in_turns)


@dataclass(frozen=True)
class EvalSuite:
    """What a phase is asked at every evaluation."""

    asking: GenerationEval
    parts: Mapping[str, tuple[Sequence[Question], RewardScorer]]
    """By what they are measured as: nothing for answers, `verdict_` for conclusions of critiques."""

    def responses(self, lm: Any, share: tuple[int, int]) -> Iterator[tuple[str, list[Row]]]:
        """Of one generated batch after the other: what its responses are measured as, and these."""
        for name, (asked, judge) in self.parts.items():
            for rows in self.asking.answering(lm, asked, judge, share):
                yield name, rows


class Sitting:
    """One worker's part in an exam, in short calls: between two of them the driver may save, or end it."""

    def __init__(self, exam: EvalSuite, whole_model: Callable[[], AbstractContextManager[Any]], share: tuple[int, int]):
        self._responses = self._begun(exam, whole_model, share)

    @staticmethod
    def _begun(
        exam: EvalSuite, whole_model: Callable[[], AbstractContextManager[Any]], share: tuple[int, int]
    ) -> Iterator[tuple[str, list[Row]]]:
        with whole_model() as lm:
            yield from exam.responses(lm, share)

    def advance(self, limit_s: float) -> Answers:
        """A generated batch, and more of them until `limit_s` have passed."""
        began = time.monotonic()
        rows: dict[str, list[Row]] = {}
        for name, responses in self._responses:
            rows.setdefault(name, []).extend(responses)
            if time.monotonic() - began >= limit_s:
                return Answers(rows, is_last=False)
        return Answers(rows, is_last=True)


def exam_of(phase: Phase, *, chats: bool) -> EvalSuite:
    """The exam of a phase that has learnt conversations, or texts as they stand.
    Raises InputError for rows that cannot be asked."""
    settings = phase.eval
    assert settings is not None, "there is nothing to ask"
    tokenizer = tokenizer_for(phase.model)
    renderer = Renderer(tokenizer, phase.data.template, bos=phase.data.bos, in_turns=chats)
    asking = GenerationEval(renderer=renderer, seed=phase.seed, settings=settings)
    parts: dict[str, tuple[Sequence[Question], RewardScorer]] = {
        "": (questions.read(settings.data, settings.columns, settings.limit), by_answer)
    }
    if settings.verdicts is not None:
        parts["verdict_"] = (questions.read_verdicts(settings.verdicts, settings.limit), by_verdict)
    return EvalSuite(asking, parts)


def by_answer(expected: str, response: str) -> tuple[str | None, bool]:
    """The final answer of a response, and whether it is the expected one."""
    answer = final_answer(response)
    return answer, same(expected, answer)


def by_verdict(expected: str, response: str) -> tuple[str | None, bool]:
    """The conclusion of a critique, and whether it is the expected one."""
    said = verdict(response)
    return said, said == expected
