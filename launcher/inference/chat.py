"""A conversation with a model in the terminal. It keeps the turns; how a response is generated is passed to it."""

from __future__ import annotations

import re
import sys
from contextlib import suppress

from launcher.inference.model_lookup import warn
from launcher.process.terminal import Typewriter
from training.data.formats import Chat, Message
from training.data.row_errors import RowError
from training.evaluation.evaluator import TextGenerator
from training.evaluation.streaming import key_of, respond
from training.generation.sampling import Sampling

_HELP = """\
/new    begin anew: what was said is forgotten
/help   this
/quit   leave, as Ctrl-D does
Ctrl-C  ends a response; where nothing is being written, leaves"""
_UNKNOWN = re.compile(r"/[a-z]+")
"""A word that was meant for us."""
_ROOM = 4
"""A response is left at least this part of the model's positions: rather the oldest turns are forgotten."""


def converse(model: TextGenerator, name: str, settings: Sampling, seed: int) -> None:
    """Read lines and respond to them until the person leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited from now on)
    how = "a chat" if model.chat else "this model was not trained for chats: it continues every line as it is"
    warn(f"{name}: {how}; /help")
    conversation = Conversation(model, settings, seed)
    while True:
        try:
            line = _line()
            if line is None or line.strip() == "/quit":
                return
            if line.strip() == "/help":
                print(_HELP)
            elif line.strip() == "/new":
                conversation.turns.clear()
            elif _UNKNOWN.fullmatch(line.strip()):
                warn(f"no such command: {line.strip()}; /help")
            elif line.strip():
                conversation.respond(line)
        except KeyboardInterrupt:
            print()
            return


def _line() -> str | None:
    """The next line; None at the end."""
    prompt = "> "
    if not sys.stdout.isatty():  # what is said goes into a file
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None


class Conversation:
    """What was said so far. Of a model that does not chat every line stands for itself."""

    def __init__(self, model: TextGenerator, settings: Sampling, seed: int):
        self.model, self.settings, self.seed = model, settings, seed
        self.turns: list[Message] = []
        self.number = 0
        """Of the next response; /new does not set it back, so that a question asked again is answered anew."""

    def respond(self, line: str) -> None:
        """Print the response while it is drawn; Ctrl-C ends it, and what was said until then counts as said."""
        typed = Typewriter()
        try:
            turns = self._fitting([*self.turns, {"role": "user", "content": line}])
            content = Chat(turns, loss_turns=()) if self.model.chat else line
            one = respond(self.model, content, key_of(self.seed, self.number), self.settings, typed.say)
            note = "" if one.ended else self._why_cut(len(one.tokens))
        except KeyboardInterrupt:
            note = "(interrupted)"
        except RowError as error:
            warn(str(error))
            return
        print(flush=True)
        if note:
            warn(note)
        self.number += 1
        if typed.text.strip():
            self.turns = [*turns, {"role": "assistant", "content": typed.text}]

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """The turns without the oldest, if otherwise the response would not fit into the model's
        positions. Raises RowError."""
        window = self.model.window
        if window is None or not self.model.chat:
            return turns
        self.model.ids(Chat(turns[-1:], loss_turns=()))  # what does not fit alone is refused, and nothing forgotten
        room = min(self.settings.max_new_tokens, window // _ROOM)
        left = turns
        while len(left) > 2 and len(self.model.tokens(Chat(left, loss_turns=()))) + room > window:
            left = left[2:]
        if gone := len(turns) - len(left):
            warn(f"(the model has {window:,} positions: the oldest {gone} turns are dropped; /new starts a new chat)")
        return left

    def _why_cut(self, tokens: int) -> str:
        if tokens >= self.settings.max_new_tokens:
            return f"(cut off at {tokens:,} tokens; raise --max-new-tokens)"
        return f"(cut off: the model's {self.model.window:,} positions are full)"
