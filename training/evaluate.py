"""Evaluation by generated answers: a model answers questions, the answers are compared with the right ones.

Workers share the questions out; each writes and judges its own. What a question is answered does not depend on who does it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from training.answers import final_answer, same, verdict
from training.config import Questions
from training.data.render import Renderer
from training.measures import Row
from training.questions import Question
from training.sampling import Sampling, continue_all
from training.seeding import seed_for


def answered(
    lm: Any,
    renderer: Renderer,
    questions: Sequence[Question],
    settings: Questions,
    *,
    seed: int,
    chat: bool,
    ends: Collection[int],
    judge: Callable[[str, str], tuple[str | None, bool]],
    share: tuple[int, int] = (0, 1),
) -> list[Row]:
    """The responses to questions rank, rank + size, ... for a `share` of (rank, size), judged."""
    rank, size = share
    mine = [(number, sample) for number in range(rank, len(questions), size) for sample in range(settings.samples)]
    if not mine:
        return []
    ids = {number: renderer.prompt(questions[number].text, chat=chat) for number in dict(mine)}
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p)
    keys = [seed_for(seed, "sample", 0, number, sample) for number, sample in mine]
    continued = continue_all(lm, [ids[number] for number, _ in mine], keys, ends, sampling, batch=settings.batch)
    rows = []
    for (number, sample), one in zip(mine, continued, strict=True):
        question, response = questions[number], renderer.text(one.tokens)
        answer, correct = judge(question.expected, response)
        rows.append(
            {
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
        )
    return rows


def by_answer(expected: str, response: str) -> tuple[str | None, bool]:
    """The final answer of a response, and whether it is the expected one."""
    answer = final_answer(response)
    return answer, same(expected, answer)


def by_verdict(expected: str, response: str) -> tuple[str | None, bool]:
    """The conclusion of a critique, and whether it is the expected one."""
    said = verdict(response)
    return said, said == expected


def end_tokens(tokenizer: Any, generation: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's own generation settings name."""
    named = getattr(generation, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
