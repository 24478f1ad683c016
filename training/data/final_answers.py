"""Final answers: found in a text, compared as mathematics. Knows no model.

A final answer is, in this order: what the last `\\boxed{}` holds, what follows the last `####`, or `A:` at the start of
a line, the last number of the text.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

_MARKED = re.compile(r"(?:####|^[ \t]*A:)[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?!\w)")
_COMPARE_S = 5
"""Longest time for one comparison: a model may write a tower of powers."""

VERDICT = re.compile(r"Conclusion:\s*(right|wrong|correct|incorrect)\b", re.IGNORECASE)
_VERDICTS = {
    "right": "right",
    "correct": "right",
    "true": "right",
    "wrong": "wrong",
    "incorrect": "wrong",
    "false": "wrong",
}


def final_answer(text: str) -> str | None:
    """The final answer of a worked solution, None if there is none."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if marked := _MARKED.findall(text):
        return str(marked[-1])
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def expected_answer(text: str) -> str:
    """The answer that a data set gives: the final one of a worked solution,
    or the text itself if that is all there is."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    marked = _MARKED.findall(text)
    return marked[-1] if marked else text.strip()


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last `\\boxed{`, which may hold braces of its own."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = depth = start + len("\\boxed{")
    level = 1
    for depth in range(begin, len(text)):
        level += {"{": 1, "}": -1}.get(text[depth], 0)
        if level == 0:
            return text[begin:depth].strip()
    return None


def same(expected: str, given: str | None) -> bool:
    """Whether two answers are equal as mathematics: `0.5`, `1/2` and `\\frac{1}{2}` are.

    Call it in the main thread of a process: the time limit is a signal.
    """
    if given is None:
        return False
    if _plain(expected) == _plain(given):
        return True
    numbers = _value(expected), _value(given)
    if numbers[0] is not None and numbers[1] is not None:
        return math.isclose(numbers[0], numbers[1], rel_tol=1e-9, abs_tol=1e-12)
    from math_verify import verify

    expected, given = _bare(expected), _bare(given)
    with _quiet():
        return bool(verify(_parsed(expected), _parsed(given), timeout_seconds=_COMPARE_S))


_BOLD = re.compile(r"\\(?:textbf|mathbf)\{\s*\(?(.*?)\)?\s*\}")


def _bare(text: str) -> str:
    """Without bold face, and without the parentheses of a choice in it: `\\textbf{(73)}`."""
    found = _BOLD.fullmatch(text.strip())
    return found[1] if found else text


def _plain(text: str) -> str:
    return text.strip().strip("$").rstrip(".").replace(",", "").replace(" ", "")


def _value(text: str) -> float | None:
    """Of a plain number such as 1,234.50 or -3."""
    try:
        return float(_plain(text))
    except ValueError:
        return None


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    values: list[Any] = parse(f"\\boxed{{{text}}}", parsing_timeout=_COMPARE_S)
    return values


class _quiet:
    """Without the library's tracebacks about answers that are no mathematics: that is an answer, too."""

    def __enter__(self) -> None:
        logging.disable(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        logging.disable(logging.NOTSET)


def verdict(critique: str) -> str | None:
    """`right` or `wrong`: what a critique concludes, None if it does not conclude."""
    found = VERDICT.findall(critique)
    return _VERDICTS[found[-1].lower()] if found else None


def as_verdict(value: Any) -> str | None:
    """`right` or `wrong` from what a column says (`correct`, true, ...); None if it says neither."""
    return _VERDICTS.get(str(value).strip().lower())
