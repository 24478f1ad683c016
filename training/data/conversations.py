"""From a conversation to its text, and to the parts of the text that are learned, by a chat template. Knows no token.

Some templates rewrite earlier turns: those of thinking models take the thoughts out of an answer once a question
follows. Whether one does is seen in what it renders: an answer is *intact* in a text if the text begins with what
inference saw when that answer was due, and goes on with the answer as the template writes it at that moment. Only
intact answers are learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal, NamedTuple

from training.data.files import one_line
from training.data.formats import Arguments, Chat, Message
from training.data.row_errors import RowError

Span = tuple[int, int]  # characters [start, end) of a rendered text
Turns = Literal["auto", "last", "all"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPENED = re.compile(r"<(\w+)>\s*$")
"""A tag that a prompt opens for the answer."""
_PLACE = "\ue000"
"""A character that no template writes: where it stands in a rendered text, an answer would."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that transformers shows to a template under each of these names."""


class Written(NamedTuple):
    """A sequence that is learned from."""

    text: str
    spans: list[Span]
    """What is learned of it, ascending."""
    left_out: int = 0
    """Answers that could be learned and are not."""


class Conversations:
    """Writes conversations with the chat templates of one tokenizer. `turns` is the setting `data.turns`.

    Methods raise RowError, or what a template raises: it is a program,
    and refuses on purpose or trips over what it did not expect.
    """

    def __init__(self, tokenizer: Any, turns: Turns, note: Callable[[str], None]):
        self._tokenizer = tokenizer
        self._turns = turns
        self._note = note
        self._known_form: tuple[Chat, str, Chat] | None = None
        self._unwritten: set[str] = set()
        """What of messages the template is known not to write."""
        self._opens: dict[str, bool] = {}
        """Of templates: see `_always_opens`."""
        self._calls_left_out: dict[tuple[Any, ...], bool] = {}
        """By template and kind of message."""
        self.changes: set[str] = set()
        """See `formats.CHANGES`."""

    def write(self, chat: Chat, template: str, count: int, prompt: bool = False) -> str:
        """The first `count` messages; with `prompt`, up to where the assistant begins to speak."""
        chat = self._in_form(chat, template)
        text = self._render(chat, template, count, prompt)
        if prompt:
            self._look_for_unwritten(chat, template, count, text)
        return text

    def learned(self, chat: Chat, template: str) -> list[Written] | RowError:
        """The sequences that are learned of a conversation, in the order of the answers: one,
        or with `turns: all` as many as it takes.

        A conversation without answers to learn is one text without spans.
        """
        try:
            chat = self._in_form(chat, template)
            if chat.loss_turns and not GENERATION.search(template) and self._always_opens(template):
                return RowError(
                    "the chat template begins an answer behind every conversation, also where none is asked for (it "
                    "does not look at add_generation_prompt), so the end of an answer cannot be told from it; set "
                    "data.template to one that does"
                )
            if not chat.loss_turns:
                text = self._render(chat, template, len(chat.messages))
                text.encode()
                self._look_for_unwritten(chat, template, len(chat.messages), text)
                return [Written(text, [])]
            return self._sequences(chat, template)
        except RowError as error:
            return error
        except UnicodeEncodeError:
            return RowError("half of a surrogate pair is not text")
        except Exception as error:
            return RowError(f"the chat template refuses this conversation: {one_line(error)}")

    def _always_opens(self, template: str) -> bool:
        """Whether a template writes the beginning of an answer behind a conversation that ends with one,
        and whether it is asked to or not."""
        if template not in self._opens:
            turns = [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "Go"},
            ]
            chat = Chat(turns, ())
            try:
                asked, answered, whole = (self._render(chat, template, count) for count in (1, 2, 3))
                ignores = asked == self._render(chat, template, 1, prompt=True)
            except Exception:  # the conversations of the rows may be others
                ignores, asked, answered, whole = False, "", "", ""
            same_end = asked.rstrip()[-1:] == answered.rstrip()[-1:] != ""
            closed = (
                answered.rstrip().removesuffix(self._tokenizer.eos_token or "").rstrip()
            )  # some close every text with EOS
            self._opens[template] = ignores and same_end and not whole.startswith(closed)
        return self._opens[template]

    def _sequences(self, chat: Chat, template: str) -> list[Written]:
        wanted = chat.loss_turns[-1:] if self._turns == "last" else chat.loss_turns
        text, spans = self._longest(chat, template, wanted)
        sequences = [Written(text, _flat(spans, wanted), len(chat.loss_turns) - len(spans))]
        if self._turns != "all":
            return sequences
        sequences = [sequences[0]._replace(left_out=0)]
        while wanted := tuple(turn for turn in wanted if turn not in spans):
            text, spans = self._longest(chat, template, wanted)
            sequences.insert(0, Written(text, _flat(spans, wanted)))
        return sequences

    def _longest(self, chat: Chat, template: str, wanted: Sequence[int]) -> tuple[str, dict[int, list[Span]]]:
        """A text in which the last of the wanted answers is intact,
        and the spans of all that are: the whole conversation, or up to there."""
        last = wanted[-1] + 1
        for count in dict.fromkeys((len(chat.messages) if wanted[-1] == chat.loss_turns[-1] else last, last)):
            text, spans = self._intact(chat, template, count, wanted)
            if wanted[-1] in spans:
                break
        else:
            text, spans = self._behind_its_prompt(chat, template, wanted[-1])
        text.encode()
        self._look_for_thoughts(chat, text, spans)
        without_calls = self._look_for_unwritten(chat, template, count, text)
        if empty := [turn for turn in without_calls if turn in spans and not chat.messages[turn]["content"].strip()]:
            raise RowError(
                f"the chat template does not write the tool calls of messages[{empty[0]}], so an empty answer would be "
                "learned; set data.template to one that does (chatml, plain, that of the model's family), or give the "
                "message `weight: 0`"
            )
        return text, spans

    def _intact(
        self, chat: Chat, template: str, count: int, wanted: Sequence[int]
    ) -> tuple[str, dict[int, list[Span]]]:
        """The text of the first `count` messages, and the spans in it of the wanted answers that are intact."""
        if GENERATION.search(template):
            return self._intact_marks(chat, template, count, wanted)
        text = self._render(chat, template, count)
        spans = {turn: self._span(chat, template, text, turn, count) for turn in wanted}
        return text, {turn: [span] for turn, span in spans.items() if span is not None}

    def _span(self, chat: Chat, template: str, text: str, turn: int, count: int) -> Span | None:
        """Where an assistant turn lies: from the end of its prompt to its end-of-turn token,
        without white space after it."""
        prompt = self._render(chat, template, turn, prompt=True)
        until = (text if turn + 1 == count else self._render(chat, template, turn + 1)).rstrip()
        end = self._common_end(chat, template, text, until, turn)
        return (len(prompt), end) if text.startswith(prompt) and end is not None and len(prompt) < end else None

    def _common_end(self, chat: Chat, template: str, text: str, until: str, turn: int) -> int | None:
        """Where `until`, the conversation up to the answer `turn`, ends in `text`, white space aside;
        None if `text` does not go on from it.

        Some templates close every text with the EOS token, whoever spoke last (Phi-3): in a text
        that goes on there is none.
        """
        until, eos = until.rstrip(), self._tokenizer.eos_token
        if text.startswith(until):
            return len(until)
        before = until.removesuffix(eos).rstrip() if eos else until
        if before == until or not text.startswith(before):
            return None
        return len(before) if self._render(chat, template, turn).rstrip().endswith(eos) else None

    def _intact_marks(
        self, chat: Chat, template: str, count: int, wanted: Sequence[int], *, by_prompt: bool = True
    ) -> tuple[str, dict[int, list[Span]]]:
        """The same by the template's own marks. Where all answers are wanted and intact,
        every mark counts, wherever it stands.

        `by_prompt`: an answer is intact only behind its own prompt.
        """
        text, marks = self._marked(chat, template, count)
        answers = [turn for turn, message in enumerate(chat.messages[:count]) if message["role"] == "assistant"]
        until = {turn: self._marked(chat, template, turn + 1) for turn in wanted if turn + 1 < count}
        ends = {turn: self._common_end(chat, template, text, each, turn) for turn, (each, _) in until.items()}
        intact = [turn for turn in wanted if turn not in ends or ends[turn] is not None]
        if by_prompt:
            intact = [turn for turn in intact if text.startswith(self._prompt_if_any(chat, template, turn))]
        if len(intact) < len(wanted):
            self.changes.add("rewritten")
        if intact == answers:
            return text, {turn: marks if turn == intact[-1] else [] for turn in intact}
        if len(wanted) < len(answers):
            self.changes.add("marks")
        own: dict[int, list[Span]] = {}
        for turn in intact:
            first = len(self._marked(chat, template, turn)[1]) if turn else 0
            here = until[turn][1] if turn in until else marks
            if here[first:] == marks[first : len(here)]:
                own[turn] = here[first:]
        return text, own

    def _prompt_if_any(self, chat: Chat, template: str, turn: int) -> str:
        """The prompt of an answer; "" where the template refuses to write one."""
        try:
            return self._render(chat, template, turn, prompt=True)
        except Exception:
            return ""

    def _behind_its_prompt(self, chat: Chat, template: str, turn: int) -> tuple[str, dict[int, list[Span]]]:
        """What inference sees of an answer that the template does not write behind its own
        prompt: the prompt, and then the answer.

        Two kinds of templates do so. Some begin the thoughts of an answer in the prompt and take thoughts out of every
        answer that is given (QwQ, DeepSeek R1). Others write something into the prompt alone (Mistral's system message,
        with the last question). Raises RowError if the answer cannot be told from its prompt.
        """
        prompt = self._prompt_if_any(chat, template, turn)
        opened = _OPENED.search(prompt)
        answer = (
            self._with_thoughts(chat, template, turn, opened[1])
            if opened
            else _behind(self._render(chat, template, turn + 1), prompt, chat.messages[turn - 1]["content"])
        )
        if answer is not None:
            self._note(
                "the chat template does not write answers behind their own prompt; they are learned there, as "
                "inference has them"
            )
            text = (prompt + answer).rstrip()
            return text, {turn: [(len(prompt), len(text))]}
        if GENERATION.search(template):  # what the author has marked holds
            return self._intact_marks(chat, template, turn + 1, (turn,), by_prompt=False)
        begun = f", which begins the answer with <{opened[1]}>: give answers with their thoughts" if opened else ""
        raise RowError(
            f"the chat template writes messages[{turn}] differently from its own generation prompt{begun}, so its "
            "tokens cannot be found; "
            "set data.template to one that goes on from its prompt (chatml, plain, or a file that marks answers with "
            "{% generation %})"
        )

    def _with_thoughts(self, chat: Chat, template: str, turn: int, tag: str) -> str | None:
        """An answer with the thoughts that its prompt has opened, and the end of the turn;
        None if it has no thoughts."""
        message = chat.messages[turn]
        thoughts = next((message[key] for key in REASONING if message.get(key)), None)
        answer = message["content"].strip().removeprefix(f"<{tag}>").removeprefix("\n")
        if isinstance(thoughts, str):
            answer = f"{thoughts.strip()}\n</{tag}>\n\n{answer}"
        if f"</{tag}>" not in answer or "tool_calls" in message:
            return None
        messages = [*chat.messages[:turn], {**message, "content": _PLACE}]
        written = self._render(replace(chat, messages=messages), template, turn + 1)
        return answer + written.partition(_PLACE)[2] if _PLACE in written else None

    def _marked(self, chat: Chat, template: str, count: int) -> tuple[str, list[Span]]:
        """The first `count` messages and the spans that the template marks with `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        texts, spans = render(
            [chat.messages[:count]],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]

    def _render(self, chat: Chat, template: str, count: int, prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            chat.messages[:count],
            tools=chat.tools,
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        return str(text)

    # ── forms of tool calls ──

    def _in_form(self, chat: Chat, template: str) -> Chat:
        """The conversation in the first form of its tools and tool calls that the template can write.

        Raises what the template raises for the row's own form if it can write none.
        """
        if not chat.tools and not any("tool_calls" in message for message in chat.messages):
            return chat
        if self._known_form is None or self._known_form[0] is not chat or self._known_form[1] != template:
            self._known_form = (chat, template, self._first_form(chat, template))
        return self._known_form[2]

    def _first_form(self, chat: Chat, template: str) -> Chat:
        written: list[tuple[Chat, str]] = []
        errors: list[Exception] = []
        for form in _forms(chat):
            try:
                written.append((form, self._render(form, template, len(form.messages), prompt=not form.loss_turns)))
            except Exception as error:
                errors.append(error)
                continue
            if not _holds_python(written[-1][1], form):
                break
        if not written:
            raise errors[_own_form(chat)]
        form, text = written[0] if _holds_python(written[-1][1], written[-1][0]) else written[-1]
        if len(written) > 1 and not errors:  # the first form, which was used before, could be written, but wrongly
            self.changes.add("arguments")
        return self._with_tools(form, template, text)

    def _with_tools(self, form: Chat, template: str, text: str) -> Chat:
        """The same form, or the one whose tools have no wrapper if only their names are written."""
        if not form.tools or _names_tools(text, form.tools):
            return form
        bare = replace(form, tools=[tool.get("function", tool) for tool in form.tools])
        try:
            if _names_tools(self._render(bare, template, len(bare.messages), prompt=not bare.loss_turns), form.tools):
                self.changes.add("arguments")
                return bare
        except Exception:  # the form at hand can be written
            return form
        self._note("the chat template does not write the tools of the rows, so the model does not see them")
        return form

    def _look_for_thoughts(self, chat: Chat, text: str, turns: Iterable[int]) -> None:
        for turn in turns:
            for key in REASONING:
                thought = chat.messages[turn].get(key)
                if isinstance(thought, str) and thought.strip() not in text:
                    self._note(
                        f"the chat template does not write `{key}` of messages, so these thoughts are not learned"
                    )

    # ── what the template leaves out ──

    def _look_for_unwritten(self, chat: Chat, template: str, count: int, text: str) -> list[int]:
        """Note what of the first `count` messages has no part in their text.
        Returns the answers whose tool calls have none."""
        calls: list[int] = []
        for turn, message in enumerate(chat.messages[:count]):
            is_answer, content = message["role"] == "assistant", message.get("content", "").strip()
            if "tool_calls" in message and self._leaves_out_calls(chat, template, count, turn, text):
                calls.append(turn)
                self._note("the chat template does not write tool calls, so the model does not see them")
            if not content or content in text or (is_answer and "tool_calls" not in message):
                continue
            what = "the text of messages that call tools" if is_answer else f"messages of the role `{message['role']}`"
            if what not in self._unwritten and self._leaves_out(chat, template, count, turn, {"content": _PLACE}):
                self._unwritten.add(what)
                self._note(
                    f"the chat template does not write {what} in some conversations: the model does not see them"
                )
        return calls

    def _leaves_out_calls(self, chat: Chat, template: str, count: int, turn: int, text: str) -> bool:
        """Looked for in the text where no tools are named there, too; else found out once for messages of a kind."""
        message = chat.messages[turn]
        names = [str(call["function"]["name"]) for call in message["tool_calls"]]
        if not chat.tools and all(name in text for name in names):
            return False
        kind = (template, len(names), bool(message.get("content")), turn + 1 == count)
        if kind not in self._calls_left_out:
            self._calls_left_out[kind] = self._leaves_out(chat, template, count, turn, {"tool_calls": None})
        return self._calls_left_out[kind]

    def _leaves_out(self, chat: Chat, template: str, count: int, turn: int, other: dict[str, Any]) -> bool:
        """Whether the text would be the same with other values in a message; None: without the key."""
        changed = {key: value for key, value in {**chat.messages[turn], **other}.items() if value is not None}
        messages = [*chat.messages[:turn], {"content": "", **changed}, *chat.messages[turn + 1 :]]
        try:
            without = self._render(replace(chat, messages=messages), template, count)
        except Exception:  # the template reads it, or it would not have tripped over its absence
            return False
        return without == self._render(chat, template, count)


def _behind(text: str, prompt: str, question: str) -> str | None:
    """What stands in a text behind the end of a prompt, from the last question on;
    None if that end does not stand there."""
    question = question.strip()
    at = prompt.rfind(question) if question else -1
    if at < 0 or (found := text.rfind(prompt[at:])) < 0:
        return None
    return text[found + len(prompt) - at :] or None


def _flat(spans: dict[int, list[Span]], wanted: Sequence[int]) -> list[Span]:
    return [span for turn in wanted for span in spans.get(turn, [])]


def _forms(chat: Chat) -> Iterator[Chat]:
    """The conversation as templates may want it, the likeliest first: arguments as objects or as text, the content of a
    message that only calls tools as an empty text or absent, tools with their wrapper or without."""
    for bare, absent, as_text in product((False, True), repeat=3):
        messages = [_message_in_form(message, as_text, absent) for message in chat.messages]
        tools = [tool["function"] for tool in chat.tools] if bare and chat.tools else chat.tools
        if not bare or chat.tools:
            yield replace(chat, messages=messages, tools=tools)


def _message_in_form(message: Message, as_text: bool, absent: bool) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [_call_in_form(call) if as_text else call for call in message["tool_calls"]]
    kept = {key: value for key, value in message.items() if key != "content" or not absent or value}
    return {**kept, "tool_calls": calls}


def _call_in_form(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments.text if isinstance(arguments, Arguments) else Arguments(arguments).text
    return {**call, "function": {**call["function"], "arguments": text}}


def _own_form(chat: Chat) -> int:
    """The place among the forms of what the row itself has."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", [])]
    own = [call["function"]["arguments"] for call in calls]
    return int(any(isinstance(each, Arguments) and each.own_text is not None for each in own))


def _holds_python(text: str, form: Chat) -> bool:
    """Whether arguments stand in the text as Python prints an object, which no template means to write."""
    calls = [call["function"]["arguments"] for message in form.messages for call in message.get("tool_calls", [])]
    return any(str(dict(each)) in text for each in calls if isinstance(each, dict) and each)


def _names_tools(text: str, tools: Sequence[dict[str, Any]]) -> bool:
    return all(str(tool.get("function", tool)["name"]) in text for tool in tools)
