"""Continues prompts one after the other and yields each response as it is generated. Knows no runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from training.data.formats import Chat, Prompt
from training.evaluation.evaluator import TextGenerator
from training.generation.sampling import Continued, Sampling
from training.seeding import seed_for

_LONGEST_CHARACTER = 3
"""Tokens of the beginning of a character: its bytes but one."""
_WINDOW, _KEPT = 64, 8
"""Tokens that are decoded together at most, and of these how many when it becomes too many."""
_HOLE = "\ufffd"


def key_of(seed: int, number: int, sample: int = 0) -> int:
    """Seeds a response: by the number of its prompt, and which of several responses to it this is."""
    return seed_for(seed, "sample", 0, number, sample)


class Streamed:
    """Text from tokens that come one by one, in whole characters: a token can be a part of one."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._said = ""

    def add(self, token: int) -> str:
        """What can be said now that was not said yet."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        whole = text[: max(len(text.rstrip(_HOLE)), len(text) - _LONGEST_CHARACTER)]
        new, self._said = whole[len(self._said) :], whole if len(whole) > len(self._said) else self._said
        if whole == text and len(self._tokens) > _WINDOW:  # decoding all of it again and again would take ever longer
            self._tokens = self._tokens[-_KEPT:]
            self._said = self._decode(self._tokens)
        return new

    def end(self) -> str:
        """What is left when no more comes."""
        return self._decode(self._tokens)[len(self._said) :]


def respond(
    model: TextGenerator, content: str | Chat | Prompt, key: int, settings: Sampling, say: Callable[[str], None]
) -> Continued:
    """The response to one prompt, said piece by piece while it is drawn.
    Raises RowError for a prompt that cannot be put."""
    streamed = Streamed(model.text)

    def heard(_: int, token: int) -> None:
        if piece := streamed.add(token):
            say(piece)

    (one,) = model.continued([(model.ids(content), key)], settings, heard=heard)
    say(streamed.end())
    return one
