"""What a reward function asks for is read from its source, and held against the columns of the prompts."""

from __future__ import annotations

import sys

import pytest

from training.config import PPO
from training.data.reward_signature import Signature, check, notes, signature_of
from training.errors import InputError


class Prompts(list):
    """Rows of a store."""

    def row(self, index):
        return self[index]


ROWS = Prompts([{"prompt": "1 + 1", "answer": "2", "completions": ["2"]}])


def phase(path: str, **data) -> PPO:
    return PPO.model_validate(
        {"recipe": "ppo", "model": {"path": "m"}, "data": {"train": "p.jsonl", **data}, "reward": path}
    )


def refused(path: str, rows=ROWS, **data) -> str:
    with pytest.raises(InputError) as caught:
        check(phase(path, **data), rows)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def score(prompts, completions, solution): ...",
            "asks for `solution`, which is no column of the prompts (answer)",
        ),
        (
            "def score(completions, *, log_metric): ...",
            "asks for `log_metric`, which only TRL's trainers have; give it a default",
        ),
        (
            "async def score(prompt, completions): ...",
            "asks for `prompt`, which is no column of the prompts (answer); the prompts come as `prompts`",
        ),
        ("def score(completions, /, **others): ...", "takes completions by position alone"),
        ("def scores(completions): ...", "has no function `score`; it has scores"),
        ("def score(completions)\n    pass", "mine.py, line 1 cannot be read"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_runs(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source + "\nraise RuntimeError('was run')\n")
    assert message in refused(f"{tmp_path}/mine.py:score")


@pytest.mark.parametrize(
    "source",
    [
        "def score(prompts, completions, completion_ids, answer, trainer_state=None, log_extra=None): ...",
        "def score(completions, **columns): ...",
        "from elsewhere import score",
        "from elsewhere import *",
        "score = make()",
        "@wrapped\ndef score(anything): ...",
    ],
)
def test_what_can_be_called_or_cannot_be_told_is_let_through(tmp_path, source):
    (tmp_path / "mine.py").write_text(source)
    assert check(phase(f"{tmp_path}/mine.py:score"), ROWS) == []


def test_without_rows_columns_are_not_held_against_it(tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions, solution): ...")
    assert check(phase(f"{tmp_path}/mine.py:score")) == []


def test_a_module_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "rewarding").mkdir()
    for name in ("__init__", "rules"):
        (tmp_path / f"rewarding/{name}.py").write_text("def score(completions, solution): ...\nraise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "asks for `solution`" in refused("rewarding.rules:score")
    assert "rewarding" not in sys.modules
    assert check(phase("not_here.rules:score"), ROWS) == [
        "the module not_here.rules of the reward not_here.rules:score was not found here; the workers must have it"
    ]


def test_columns_that_cannot_be_arguments_are_told_of():
    (note,) = notes(phase("mine.py:score"), ROWS)
    assert note.startswith("reward functions do not see the data's columns `completions`: arguments have these names")
    mapped = notes(phase("mine.py:score", columns={"prompt": "prompts"}), Prompts([{"prompts": "1 + 1"}]))
    assert mapped == []
    assert notes(phase("http://127.0.0.1/score"), ROWS) == []


def test_conversations_are_told_of():
    (note,) = notes(phase("mine.py:score"), Prompts([{"prompt": [{"role": "user", "content": "hi"}]}]))
    assert "each completion as a list of one message" in note


def test_source_and_function_tell_the_same(tmp_path):
    from training.data.reward_signature import _read

    def score(a, b=1, *rest, c, d=2, **others): ...

    (tmp_path / "mine.py").write_text("def score(a, b=1, *rest, c, d=2, **others): ...")
    expected = Signature(required=("a", "c"), optional=("b", "d"), takes_any=True)
    assert signature_of(score) == _read(tmp_path / "mine.py", "score", "") == expected
