"""Calls with a time limit, whatever they wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimeLimitReached(TimeoutError):
    """The call has not returned in time."""


def within(limit_s: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises, in a thread of its own: what hangs cannot be ended, but need not be waited for.

    Raises TimeLimitReached after `limit_s` seconds.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeLimitReached(f"no answer within {limit_s:g} s")
    return results[0]
