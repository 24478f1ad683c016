"""Rewards that are Python functions or HTTP endpoints.

A function is called as TRL calls its reward functions, by keyword with lists of equal length: `prompts`, `completions`,
`completion_ids` and the other columns of the prompts' rows. Of prompts that are texts a completion is a text, of
conversations a list of one message. It returns a number for each response, or None for one that it does not apply to;
it may be a coroutine function. An endpoint gets prompts, the completions' texts and whole rows as JSON by POST and
answers `{"scores": [...]}`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from training.config import RewardSource
from training.data.reward_signature import GIVEN, RESERVED, is_conversation, signature_of
from training.errors import InputError, ServiceError, TrainingError
from training.io.foreign_files import loads, made_sense_of
from training.io.http_requests import RequestError, fetch
from training.io.time_limit import TimeLimitReached, within
from training.rl.experience import Response

_TRIES = 5
_PATIENCE_S = 120.0
"""With an endpoint that is away: it is asked at least so long, and so often."""
_LONGEST_PAUSE_S = 10.0


class RewardError(TrainingError):
    """A reward could not be had, or is no number."""


class RewardFunction:
    """A function in a file or a module. Raises InputError if there is none."""

    def __init__(self, source: RewardSource, column: str):
        self.source, self.column = source, column
        self.function = imported(source.path, source.folder)
        self.signature = signature_of(self.function)

    def __call__(self, responses: Sequence[Response]) -> Any:
        return self._in_time(self._arguments(responses))

    def _arguments(self, responses: Sequence[Response]) -> dict[str, Any]:
        """By name; without those that the function has no parameter for."""
        rows = [response.row for response in responses]
        names = dict.fromkeys(name for row in rows for name in row if name not in (self.column, *RESERVED))
        # A column that some rows have and none of these.
        absent = () if self.signature is None else [one for one in self.signature.required if one not in GIVEN]
        columns = {name: [row.get(name) for row in rows] for name in (*names, *absent)}
        given = {
            "prompts": [row[self.column] for row in rows],
            "completions": [self._completion(response) for response in responses],
            "completion_ids": [response.tokens.tolist() for response in responses],
        }
        arguments = columns | given
        if self.signature is None:
            return arguments
        return {name: values for name, values in arguments.items() if self.signature.accepts(name)}

    def _completion(self, response: Response) -> Any:
        if is_conversation(response.row[self.column]):
            return [{"role": "assistant", "content": response.text}]
        return response.text

    def _in_time(self, arguments: dict[str, Any]) -> Any:
        """Raises RewardError for a function that fails, or takes longer than it may."""
        try:
            return within(self.source.timeout, lambda: self._awaited(self.function(**arguments)))
        except TimeLimitReached:
            raise RewardError(
                f"the reward {self.source.path} has not answered within {self.source.timeout:g} s"
            ) from None
        except BaseException as error:  # a function may call sys.exit
            raise RewardError(f"the reward {self.source.path} raised {type(error).__name__}: {error}") from error

    def _awaited(self, result: Any) -> Any:
        """The result of a function, or of the coroutine that it returned."""

        async def wait() -> Any:
            return await result

        if not inspect.isawaitable(result):
            return result
        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """One for all calls: a client that a module keeps belongs to the loop that it was first used in."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        return loop


def imported(path: str, folder: str | None = None) -> Callable[..., Any]:
    """The function that `module:name` or `file.py:name` names. Raises InputError if there is none.

    `folder`: where modules are looked for as well, after all that is installed, and only while this one is imported.
    """
    where, _, name = path.rpartition(":")
    try:
        with _last_on_the_path(folder):
            module = _module_of_file(where, path) if where.endswith(".py") else import_module(where)
        function: Callable[..., Any] = getattr(module, name)
    except InputError:
        raise
    except Exception as error:  # whatever a module does when it is imported
        raise InputError.of(path, f"cannot be imported: {type(error).__name__}: {error}", "reward") from error
    if not callable(function):
        raise InputError.of(path, f"{name} is no function", "reward")
    return function


def _module_of_file(file: str, path: str) -> ModuleType:
    """The name of a file does not become that of a module: `math.py` must not stand in for the library."""
    name = f"reward_function_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise InputError.of(path, f"there is no file {file}", "reward")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _last_on_the_path(folder: str | None) -> Iterator[None]:
    if folder is None or folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


class RewardEndpoint:
    """A service that answers by HTTP."""

    def __init__(self, source: RewardSource, column: str):
        self.source, self.column = source, column

    def __call__(self, responses: Sequence[Response]) -> Any:
        """Raises ServiceError when patience is at its end, RewardError for an answer
        that trying again does not change."""
        rows = [response.row for response in responses]
        asked = {
            "prompts": [row[self.column] for row in rows],
            "completions": [response.text for response in responses],
            "rows": rows,
        }
        body, began = json.dumps(asked).encode(), time.monotonic()
        for number in count(1):
            try:
                return self._scores(body)
            except RequestError as error:
                is_late = isinstance(error, _NoScoresError) or time.monotonic() - began > _PATIENCE_S
                if not error.may_pass or (number >= _TRIES and is_late):
                    raise self._given_up(error, number) from error
            time.sleep(min(2.0 ** (number - 1), _LONGEST_PAUSE_S))
        raise AssertionError("counting has no end")

    def _given_up(self, error: RequestError, tries: int) -> TrainingError:
        again = error.may_pass and not isinstance(error, _NoScoresError)
        count = f"{tries} {'try' if tries == 1 else 'tries'}"
        return (ServiceError if again else RewardError)(
            f"the reward {self.source.path} cannot be had ({count}): {error}"
        )

    def _scores(self, body: bytes) -> Any:
        request = urllib.request.Request(self.source.path, body, {"Content-Type": "application/json"})
        answer = fetch(request, self.source.timeout)
        with made_sense_of(lambda _: _NoScoresError(f'its answer is no {{"scores": [...]}}: {answer[:100]!r}')):
            return loads(answer)["scores"]


class _NoScoresError(RequestError):
    """What an endpoint has answered is of another form."""
