"""A teacher behind an OpenAI-compatible endpoint: several requests at once, within a rate and a budget,
patient with servers that misbehave.

The key is read from the environment when a request is made; it is in no argument, file or message.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from training.errors import InputError, TrainingError
from training.io import foreign_files
from training.io.http_requests import RequestError, StatusError, fetch

_ADVICE = {
    401: "is the key right, and in the environment variable that --key-env names?",
    403: "may this key use this model?",
    404: "is the address right (up to /v1), and is there a model of that name?",
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_AT_FIRST_S = 60.0
"""Patience with a server that has never answered."""
_BYTES_A_TOKEN = 3.6
"""For servers that do not say what they used."""
_MOST_TOKENS = 1 << 40
"""No request takes more."""
_NONSENSE_TRIES = 3


class BudgetSpent(TrainingError):
    """The next request might cost more than what is left."""


class Nonsense(TrainingError):
    """The server answers, and what it says is no answer."""


@dataclass(frozen=True)
class Reply:
    """What a teacher has said, and what it took."""

    text: str
    cut: bool
    """It had more to say than it was allowed."""
    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the teacher is, and how it is asked."""

    url: str
    """Up to and with /v1."""
    model: str
    key_env: str | None = None
    max_new_tokens: int = 3200
    temperature: float = 0.3
    top_p: float = 0.95
    timeout_s: float = 300.0
    """Of one request, to the last byte of its answer."""
    patience_s: float = 600.0
    """Of all tries of one question together."""


@dataclass(kw_only=True)
class Budget:
    """What may be used up, in tokens and in money; requests that are under way count
    with the most that they may take."""

    tokens: int | None = None
    cost: float | None = None
    price_in: float = 0.0
    """Of a million tokens that are read."""
    price_out: float = 0.0
    """Of a million tokens that are written."""
    used_in: int = 0
    used_out: int = 0
    _held: dict[int, tuple[int, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, prompt: int, reply: int) -> int:
        """Set so many tokens aside. Raises BudgetSpent if there are not enough."""
        with self._lock:
            read = self.used_in + sum(each[0] for each in self._held.values()) + prompt
            written = self.used_out + sum(each[1] for each in self._held.values()) + reply
            if self.tokens is not None and read + written > self.tokens:
                raise BudgetSpent(
                    f"of {self.tokens:,} tokens {self.used_in + self.used_out:,} are used; one more request might take "
                    "more than is left"
                )
            if self.cost is not None and self._cost(read, written) > self.cost:
                raise BudgetSpent(
                    f"of {self.cost:g} {self.spent:.4f} is spent; one more request might cost more than is left"
                )
            number = max(self._held, default=0) + 1
            self._held[number] = (prompt, reply)
            return number

    def settle(self, number: int, prompt: int, reply: int) -> None:
        """What the request took in the end."""
        with self._lock:
            del self._held[number]
            self.used_in, self.used_out = self.used_in + prompt, self.used_out + reply

    def _cost(self, read: int, written: int) -> float:
        return (read * self.price_in + written * self.price_out) / 1e6

    @property
    def spent(self) -> float:
        return self._cost(self.used_in, self.used_out)


class Teacher:
    """Asks the endpoint, from as many threads as like. `per_minute`: requests, all threads together."""

    def __init__(
        self,
        endpoint: Endpoint,
        budget: Budget,
        per_minute: float | None = None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.endpoint, self.budget, self.say = endpoint, budget, say
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        """When the next request may go out."""
        self._lock = threading.Lock()
        self._told = 0.0
        self._has_answered = False
        self._doubted = False
        """Whether it was told that the server's counts are none."""
        self.stopping = threading.Event()
        """Set it to have requests end as soon as they can."""

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Its answer. Raises BudgetSpent, Nonsense, InputError for what no patience mends,
        TrainingError when patience is at its end."""
        prompt = round(sum(len(message["content"].encode()) for message in messages) / _BYTES_A_TOKEN)
        held = self.budget.hold(prompt, self.endpoint.max_new_tokens)
        taken = (0, 0)
        try:
            reply = self._patiently(messages, prompt)
            taken = (reply.prompt_tokens, reply.reply_tokens)
            return reply
        finally:
            self.budget.settle(held, *taken)

    def _patiently(self, messages: list[dict[str, str]], prompt: int) -> Reply:
        began, pause, nonsense = time.monotonic(), _FIRST_PAUSE_S, 0
        while True:
            self._wait_turn()
            asked_to_wait = 0.0
            try:
                reply = self._reply(self._post(messages), prompt)
                self._has_answered = True
                return reply
            except StatusError as error:
                why = f"HTTP {error.code}"
                if not error.may_pass:
                    advice = _ADVICE.get(error.code, error.said)
                    raise InputError.of(
                        self.endpoint.url, f"refuses the request ({why}): {advice}", "--teacher"
                    ) from None
                asked_to_wait = _retry_after(error)
            except Nonsense as error:
                nonsense += 1
                why = str(error)
                if nonsense == _NONSENSE_TRIES:
                    raise
            except RequestError as error:
                why = str(error)
            waited = time.monotonic() - began
            pause_s = max(asked_to_wait, pause * random.uniform(0.5, 1.5))
            patience = self.endpoint.patience_s
            if not self._has_answered:  # it may not be there at all
                patience = min(patience, _AT_FIRST_S)
            if waited + pause_s > patience or self.stopping.is_set():
                raise TrainingError(f"{self.endpoint.url} does not answer ({why}), tried for {waited:.0f} s")
            self._tell(why)
            if self.stopping.wait(pause_s):
                raise TrainingError(f"{self.endpoint.url} had not answered ({why})")
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _wait_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        if at > now:
            self.stopping.wait(at - now)

    def _tell(self, why: str) -> None:
        """Not for every request: there are many."""
        now = time.monotonic()
        if now - self._told > 10:
            self._told = now
            self.say(f"the teacher does not answer ({why}); trying on")

    def _post(self, messages: list[dict[str, str]]) -> bytes:
        endpoint = self.endpoint
        body = {
            "model": endpoint.model, "messages": messages, "max_tokens": endpoint.max_new_tokens,
            "temperature": endpoint.temperature, "top_p": endpoint.top_p,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{endpoint.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        if endpoint.key_env is not None:  # for this address alone: not for where a redirect leads
            request.add_unredirected_header("Authorization", f"Bearer {os.environ[endpoint.key_env]}")
        return fetch(request, endpoint.timeout_s)

    def _reply(self, body: bytes, prompt: int) -> Reply:
        with foreign_files.made_sense_of(lambda _: Nonsense(f"its answer is none: {body[:100]!r}")):
            told: dict[str, Any] = foreign_files.loads(body)
            choice = told["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
            reply = round(len(text.encode()) / _BYTES_A_TOKEN)  # which half a character cannot be
            usage = told.get("usage") or {}
            read, wrote = usage.get("prompt_tokens"), usage.get("completion_tokens")
            cut = choice.get("finish_reason") == "length"
            return Reply(text, cut, self._counted(read, prompt), self._counted(wrote, reply))

    def _counted(self, said: Any, estimate: int) -> int:
        """Tokens that the server says it used. What is no count is not believed: the estimate counts,
        so that no budget is lifted."""
        if type(said) is int and 0 < said < _MOST_TOKENS:
            return said
        if said not in (None, 0) and not self._doubted:
            self._doubted = True
            self.say(
                f"the teacher says that a request took {str(said)[:40]} tokens; {_BYTES_A_TOKEN} bytes are counted as "
                "a token instead"
            )
        return estimate


def _retry_after(error: StatusError) -> float:
    """Seconds that a server asks to wait, as a number or a date. 0 for anything else."""
    told = next((value for name, value in error.headers.items() if name.lower() == "retry-after"), "")
    seconds = 0.0
    with suppress(ValueError):
        seconds = float(told)
        return seconds if 0 < seconds < math.inf else 0.0
    with suppress(ValueError, TypeError, OverflowError):
        seconds = parsedate_to_datetime(told).timestamp() - time.time()
    return max(0.0, seconds)
