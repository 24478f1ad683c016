"""What responses are worth: a reward model, a Python function, an HTTP endpoint. All of them are `Judge`s.

A function is called as TRL calls its reward functions: `score(prompts, completions, **columns)`, lists of equal length, the
columns being those of the prompts' rows; it returns a number for each. An endpoint gets the same as JSON by POST and answers
`{"scores": [...]}`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from training.config import PPO, RewardSource
from training.data.files import RowError
from training.data.formats import Chat, Parser, Prompt
from training.data.model_renderer import renderer_for
from training.data.render import Sample
from training.distributed import Seat
from training.errors import InputError, TrainingError
from training.recipes.reward import score
from training.rl.base import of_reward
from training.rl.experience import Response

Judge = Callable[[Sequence[Response]], list[float]]
_TRIES = 5


class RewardError(TrainingError):
    """A reward could not be had, or is no number."""


def opened(source: RewardSource, phase: PPO, seat: Seat) -> Judge:
    """The judge that a source names. Raises InputError if there is no such thing."""
    if source.is_endpoint:
        return _checked(_Endpoint(source, prompt_column(phase)), source)
    if source.is_function:
        return _checked(_Function(source, prompt_column(phase)), source)
    return _checked(_RewardModel(source.path, phase, seat), source)


def _checked(judge: Judge, source: RewardSource) -> Judge:
    def judged(responses: Sequence[Response]) -> list[float]:
        scores = judge(responses)
        if not isinstance(scores, list | tuple | np.ndarray) or len(scores) != len(responses):
            got = f"{len(scores)}" if hasattr(scores, "__len__") else f"a {type(scores).__name__}"
            raise RewardError(f"the reward {source.path} was asked for {len(responses)} scores and gave {got}")
        for response, one in zip(responses, scores, strict=True):
            if isinstance(one, bool | str) or not isinstance(one, int | float | np.number) or not math.isfinite(one):
                raise RewardError(
                    f"the reward {source.path} gave {one!r} for the response {response.text[:200]!r}; expected a finite number"
                )
        return [float(one) for one in scores]

    return judged


class _RewardModel:
    """A sequence classifier with one label. It reads what the policy wrote as text, in its own tokens, as in its training."""

    def __init__(self, path: str, phase: PPO, seat: Seat):
        self.lm, self.head, self.ready = of_reward(path, phase, seat)
        self.renderer = renderer_for(path)
        self.parse = Parser("prompts", phase.data.columns, ("prompts",))

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        rendered = self.renderer.judged(
            [self._prompt(response.row) for response in responses],
            [response.text for response in responses],
            [response.ended for response in responses],
        )
        if refused := [each for each in rendered if isinstance(each, RowError)]:
            raise RewardError(f"a response cannot be put to the reward model: {refused[0]}")
        self.ready()
        return score(self.lm, [each.ids for each in rendered if isinstance(each, Sample)], head=self.head)

    def _prompt(self, row: dict[str, Any]) -> str | Chat:
        """The prompt of a row as the policy has it: parts of a message joined, tool calls as objects."""
        _, example = self.parse(row)
        assert isinstance(example, Prompt), "PPO reads prompts"
        return example.content


def prompt_column(phase: PPO) -> str:
    """What the data call the prompt."""
    return phase.data.columns.get("prompt", "prompt")


class _Function:
    def __init__(self, source: RewardSource, column: str):
        self.source, self.column = source, column
        self.function = imported(source.path)

    def __call__(self, responses: Sequence[Response]) -> Any:
        rows = [response.row for response in responses]
        columns = {
            name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)
        }
        prompts = columns.pop(self.column)
        return self._in_time(prompts=prompts, completions=[response.text for response in responses], **columns)

    def _in_time(self, **arguments: Any) -> Any:
        """In a thread of its own: a function that hangs cannot be ended, but need not be waited for."""
        answer: list[Any] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                answer.append(self.function(**arguments))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.source.timeout)
        if errors:
            error = errors[0]
            raise RewardError(f"the reward {self.source.path} raised {type(error).__name__}: {error}") from error
        if not answer:
            raise RewardError(f"the reward {self.source.path} has not answered within {self.source.timeout:g} s")
        return answer[0]


def imported(path: str) -> Callable[..., Any]:
    """The function that `module:name` or `file.py:name` names. Raises InputError if there is none."""
    where, _, name = path.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None or not Path(where).is_file():
                raise InputError.of(path, f"there is no file {where}", "reward")
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(Path(where).stem, module)
            spec.loader.exec_module(module)
        else:
            module = import_module(where)
        function = getattr(module, name)
    except InputError:
        raise
    except Exception as error:  # whatever a module does when it is imported
        raise InputError.of(path, f"cannot be imported: {type(error).__name__}: {error}", "reward") from error
    if not callable(function):
        raise InputError.of(path, f"{name} is no function", "reward")
    return function


class _Endpoint:
    def __init__(self, source: RewardSource, column: str):
        self.source, self.column = source, column

    def __call__(self, responses: Sequence[Response]) -> Any:
        rows = [response.row for response in responses]
        body = json.dumps(
            {
                "prompts": [row[self.column] for row in rows],
                "completions": [response.text for response in responses],
                "rows": rows,
            }
        )
        error: Exception | None = None
        for number in range(_TRIES):
            if number:
                time.sleep(min(2.0 ** (number - 1), 10.0))
            try:
                return self._post(body.encode())
            except (OSError, ValueError, KeyError, TypeError) as failed:
                error = failed
                if isinstance(failed, urllib.error.HTTPError) and failed.code < 500 and failed.code != 429:
                    break
        raise RewardError(f"the reward {self.source.path} cannot be had ({number + 1} tries): {error}") from error

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self.source.path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.source.timeout) as answer:
            return json.loads(answer.read())["scores"]
