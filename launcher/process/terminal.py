"""Prints the text of a model on a terminal: without control characters, and piece by piece as it is generated."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without characters that move a terminal's cursor
    or worse: a model may say anything, and so may a file."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Typewriter:
    """Prints a response as it comes, without the white space around it."""

    def __init__(self) -> None:
        self.text = ""
        """What was said, as it was."""
        self._space = ""
        """White space that is printed only if something follows."""

    def say(self, piece: str) -> None:
        begun = bool(self.text.strip())
        self.text += piece
        waiting = self._space + piece
        words = waiting.rstrip()
        self._space = waiting[len(words) :]
        if words:
            print(printable(words if begun else words.lstrip()), end="", flush=True)
