"""Questions of an evaluation: in which forms rows may hold them, and that those which cannot be put
to the model are found before anything runs."""

from __future__ import annotations

import json

import pytest

from tests.support.training_fixtures import phase_of
from training.data import question_prompts, questions
from training.data.formats import Chat, Prompt
from training.data.phase_data import open_stores
from training.errors import InputError

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(tmp_path, *rows, **options):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions.read(str(tmp_path / "q.jsonl"), **options)


@pytest.mark.parametrize(
    ("row", "text", "prompt"),
    [
        ({"question": "2 + 2?", "answer": 4}, "2 + 2?", Prompt("2 + 2?")),
        ({"question": "2 + 2?", "answer": 4, "system": "Be brief."}, "2 + 2?", Prompt("2 + 2?", "Be brief.")),
        ({"instruction": "Add 2.", "input": "2", "output": "4"}, "Add 2.\n2", Prompt("Add 2.\n2")),
        ({"prompt": [SYSTEM, USER], "answer": "4"}, "2 + 2?", Prompt(Chat([SYSTEM, USER], ()))),
        (
            {"prompt": [{**USER, "content": [{"type": "text", "text": "2 + 2?"}]}], "answer": "4"},
            "2 + 2?",
            Prompt(Chat([USER], ())),
        ),
        (
            {"messages": [USER, ANSWER], "answer": "4", "system": "Be brief."},
            "2 + 2?",
            Prompt(Chat([SYSTEM, USER], ())),
        ),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            "2 + 2?",
            Prompt(Chat([USER], ())),
        ),
    ],
)
def test_a_question_is_asked_as_rows_to_learn_from_have_it(tmp_path, row, text, prompt):
    (question,) = read(tmp_path, row)
    assert (question.text, question.expected, question.prompt) == (text, "4", prompt)


def test_the_last_answer_of_a_conversation_is_the_expected_one(tmp_path):
    (question,) = read(tmp_path, {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "#### 4"}]})
    assert question.expected == "4"
    assert question.prompt.content == Chat([USER, ANSWER, USER], ())


def test_questions_without_answers_may_be_conversations_too(tmp_path):
    (question,) = read(tmp_path, {"prompt": [USER]}, answers=False)
    assert question.prompt == Prompt(Chat([USER], ()))


@pytest.fixture
def asked(tiny, tmp_path):
    """asked(rows, settings of the phase) -> what is to be said of the questions."""

    def check(*rows, **settings):
        read(tmp_path, *rows)
        phase = phase_of(tiny, "sft", eval={"data": str(tmp_path / "q.jsonl"), "max_new_tokens": 8}, **settings)
        return question_prompts.check(phase, open_stores(phase, tmp_path / "cache").train, tmp_path / "cache")

    return check


@pytest.mark.cpu
def test_questions_that_the_template_refuses_or_that_are_too_long_are_errors(asked):
    row = {"question": "2 + 2?", "answer": "4"}
    assert asked(row, data={"template": "llama2"}) == []
    for _ in range(2):  # found out, and remembered
        with pytest.raises(InputError, match=r"q.jsonl:2: the chat template refuses this conversation"):
            asked(row, {"messages": [USER, USER, ANSWER]}, data={"template": "llama2"})
    with pytest.raises(InputError, match=r"q.jsonl:1: the question has 400 tokens, the model has 256 positions"):
        asked({**row, "question": "\t" * 399 + "?"})


@pytest.mark.cpu
def test_what_the_model_is_not_shown_of_questions_is_mentioned(asked):
    row = {"question": "2 + 2?", "answer": "4", "system": "Be brief."}
    assert any("evaluation: column `system` is not read" in note for note in asked(row))
    assert asked(row, data={"template": "chatml"}) == []
    (note,) = asked({"question": "\t" * 249 + "?", "answer": "4"})
    assert note.startswith(
        "evaluation: the longest question has 250 tokens, which leaves 6 of the model's 256 positions"
    )


@pytest.mark.cpu
def test_an_evaluation_asks_no_model_beyond_its_positions(tmp_path):
    """GPT-2 has an embedding of its positions: there is none for more of them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.training.data.test_serving_tokens import tokenizer_of
    from training.config import Questions
    from training.data.render import Renderer
    from training.evaluation.generated_answers import GenerationEval, by_answer

    torch.manual_seed(0)
    tokenizer = tokenizer_of("gpt-2")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=12)
    asking = GenerationEval(
        renderer=Renderer(tokenizer, "none"), seed=0, settings=Questions(data="-", max_new_tokens=64), stops=[-1]
    )
    rows = asking.answered(
        GPT2LMHeadModel(config).eval(), read(tmp_path, {"question": "What is 2 + 2?", "answer": 4}), by_answer
    )
    (prompt,) = Renderer(tokenizer, "none").render([Prompt("What is 2 + 2?")])
    assert rows[0]["tokens"] == 12 - len(prompt.ids)
