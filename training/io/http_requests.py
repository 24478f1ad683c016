"""One HTTP request as a whole: its answer within one time limit, or one of two errors, whatever the server sends.

RequestError       no whole answer: no connection, a reply that is cut or is no HTTP, too slow, too large; may pass
└── StatusError    an answer with a status that says no
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from training.io.time_limit import within

_AT_ONCE_BYTES = 1 << 16
_LONGEST_BYTES = 256 << 20
_SHOWN_BYTES = 300
_ODD = (OSError, http.client.HTTPException, ValueError, ArithmeticError, AttributeError, TypeError, RecursionError)
"""What Python's client raises for replies that are cut, and for those that are no HTTP."""


class RequestError(Exception):
    """There is no whole answer. `may_pass`: whether trying again may help."""

    may_pass = True


class StatusError(RequestError):
    """The server has answered with an error. `said`: the beginning of what it said."""

    def __init__(self, code: int, headers: Mapping[str, str], said: str):
        super().__init__(f"HTTP {code}: {said}" if said else f"HTTP {code}")
        self.code, self.headers, self.said = code, headers, said
        # Else the server will say the same to the same request.
        self.may_pass = code >= 500 or code in (408, 409, 425, 429)


def fetch(
    request: urllib.request.Request, timeout_s: float, opener: urllib.request.OpenerDirector | None = None
) -> bytes:
    """The body of the answer, whose first byte and last byte come within `timeout_s`.
    Raises RequestError, StatusError."""
    open_ = urllib.request.urlopen if opener is None else opener.open
    try:
        return within(timeout_s, lambda: _fetch(open_, request, timeout_s))
    except _ODD as error:
        cause = getattr(error, "reason", None) or error
        if isinstance(cause, TimeoutError):
            raise RequestError(f"no whole answer within {timeout_s:g} s") from None
        raise RequestError(str(cause) or type(error).__name__) from error


def _fetch(open_: Any, request: urllib.request.Request, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    try:
        with open_(request, timeout=timeout_s) as answer:
            return _body(answer, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise StatusError(error.code, dict(error.headers or {}), _beginning(error)) from None


def _body(answer: Any, deadline: float) -> bytes:
    """In parts: a server may name any length, and may send a byte now and then for ever."""
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(_AT_ONCE_BYTES):
        parts.append(part)
        size += len(part)
        if size > _LONGEST_BYTES:
            raise RequestError(f"an answer of more than {_LONGEST_BYTES >> 20} MiB")
        if time.monotonic() > deadline:  # nobody waits for it any more
            raise TimeoutError
    # Headers that are cut look like headers that name no length; then there is nothing behind them.
    nothing = not parts and answer.length is None and not answer.chunked
    if answer.length or nothing:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _beginning(error: urllib.error.HTTPError) -> str:
    body = b""
    with suppress(*_ODD):
        body = error.fp.read1(_SHOWN_BYTES)  # type: ignore[attr-defined]  # a response of http.client
    return " ".join(body.decode(errors="replace").split()) or str(error.reason)
