"""From an example to token ids and a target mask, with a Hugging Face fast tokenizer. Knows no file and no store.

This is the one definition of a sequence: training, evaluation, PPO, reward models, `generate` and `critique` all render
here. A plain text begins with what `tokenizer(text)` puts before it (BOS) and ends with one EOS; a conversation is what
the chat template writes, and nothing else.

A target is a token that is learnt as a label. The mask comes from positions in the text, never from token ids, so a pad
token that equals the EOS token does no harm. The first token of a sample is never a target: nothing predicts it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from training.config import Model
from training.data import templates
from training.data.conversations import Conversations, Turns, Written
from training.data.files import one_line
from training.data.formats import EOS, Answer, Chat, Example, Pair, Prompt, PromptCompletion, Text
from training.data.row_errors import RowError
from training.data.turn_end import turn_end
from training.data.vocabulary import rows_for
from training.errors import InputError
from training.model_folder import has_tokenizer, tokenizer_of, tokenizer_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TODAY_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
FIXED_DATE = date(2024, 1, 1)
_PROBE = "a"


class Sample(NamedTuple):
    """One sample, T tokens long."""

    ids: NDArray[np.uint32]
    """[T] token ids."""
    targets: NDArray[np.bool_]
    """[T] whether the token is learnt; targets[0] is False. Of a pair the last token of each of its two sequences is
    marked instead, of a prompt its last."""
    margin: float = 0.0
    """Of a pair."""
    left_out: int = 0
    """Answers of a conversation that could be learned and are not, see `data.turns`."""


def load_tokenizer(path: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face folder or hub id, there at a branch, tag or commit.

    Raises InputError if there is none, if it cannot be loaded, is not a fast one, or has no EOS token.
    """
    _check_folder(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except Exception as error:  # a broken file, an unknown hub id, remote code: the loader has no common base
        lacks = Path(path).is_dir() and not (Path(path) / "tokenizer.json").exists()
        advice = "; the folder has no tokenizer.json, which a fast tokenizer saves" if lacks else ""
        what = "the tokenizer" if Path(path).is_dir() else "there is no such folder, and as a name on the hub it"
        raise InputError.of(path, f"{what} cannot be loaded: {one_line(error)}{advice}") from error
    if not getattr(tokenizer, "is_fast", False):
        message = "only a slow tokenizer, which cannot tell where a token lies in the text; save tokenizer.json with it"
        raise InputError.of(path, message)
    if tokenizer.eos_token_id is None:
        message = "the tokenizer has no EOS token, so nothing would teach the model to stop"
        raise InputError.of(path, f"{message}; set eos_token in tokenizer_config.json")
    return cast("PreTrainedTokenizerFast", tokenizer)


def tokenizer_for(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer that a model's settings say. Raises as `load_tokenizer`."""
    return load_tokenizer(tokenizer_of(model), model.trust_remote_code, tokenizer_revision(model))


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or path.startswith(".")):
        raise InputError.of(path, "no such folder")
    if folder.is_dir() and not has_tokenizer(folder):
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        message = f"the folder has no tokenizer: it needs tokenizer.json and tokenizer_config.json, it holds {there}"
        raise InputError.of(path, f"{message}; copy them there or set model.tokenizer")


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to every text. Which of their tokens are special may differ."""
    parts = ("model", "pre_tokenizer", "normalizer")
    first, second = (json.loads(each.backend_tokenizer.to_str()) for each in (one, other))
    return one.get_vocab() == other.get_vocab() and all(first[part] == second[part] for part in parts)


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that `tokenizer(text)` puts before a text and behind it: BOS, EOS, both, others, or none.

    Raises InputError if they cannot be told from the tokens of the text.
    """
    text = tokenizer(_PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(_PROBE).input_ids
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    message = "the special tokens that the tokenizer adds to a text cannot be told from the text's own; set it to none"
    raise InputError.of("", message, what="data.bos")


class Renderer:
    """Renders examples with one tokenizer and the settings `data.template` and `data.bos`.

    `in_turns`: a prompt that is a text becomes a user's turn; so it does under any template that is named, and under
    `tokenizer`. `notes` collects, once each, what a user should know of. Raises InputError for a template that cannot
    be found or read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str = "auto",
        base: Path = Path(),
        *,
        turns: Turns = "auto",
        bos: str = "auto",
        in_turns: bool = False,
    ):
        self.tokenizer: Any = tokenizer
        self._conversations = Conversations(tokenizer, turns, self._note)
        self._setting = template
        self._named = templates.load(template, base)
        if template == templates.TOKENIZER and not tokenizer.chat_template:
            message = "the tokenizer has no chat template; name one (chatml, plain, or a Jinja file)"
            raise InputError.of("", message, what="data.template")
        self.in_turns = in_turns or self._named is not None or template == templates.TOKENIZER
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._newline = self._ids(["\n"])[0]
        self._prefix, self._closing = _frame(tokenizer, bos)
        self.notes: list[str] = []
        self.has_written_chats = False
        self.has_written_plain = False
        self._end_is_checked = False
        if tokenizer.pad_token_id is None:
            self._note("the tokenizer has no pad token; none is needed, padding is masked by position")
        if self._named is not None:
            self._check_syntax(self._named)

    def render(self, examples: Sequence[Example]) -> list[Sample | RowError]:
        """One sample, or the reason why there is none, for every example.
        Large batches are fast: Rust tokenizes them."""
        kinds: dict[type, Callable[[list[Any]], list[Sample | RowError]]]
        kinds = {
            Text: self._texts,
            PromptCompletion: self._completions,
            Chat: self._chats,
            Pair: self._pairs,
            Prompt: self._prompts,
        }
        examples = [self._as_chat(example) for example in examples]
        results: dict[int, Sample | RowError] = {}
        for kind, render in kinds.items():
            places = [place for place, example in enumerate(examples) if type(example) is kind]
            if places:
                results.update(zip(places, render([examples[place] for place in places]), strict=True))
        return [results[place] for place in range(len(examples))]

    def _check_end(self) -> None:
        """Note, once, what keeps generation from stopping where answers end."""
        if not self._end_is_checked:
            self._end_is_checked = True
            if note := turn_end(self).note:
                self._note(note)

    @functools.cached_property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer adds tokens to plain texts beside the EOS."""
        try:
            return _frame(self.tokenizer, "auto") != _frame(self.tokenizer, "none")
        except InputError:
            return True

    def samples(self, examples: Sequence[Example]) -> list[list[Sample] | RowError]:
        """All samples of every example, or the reason why there are none: of conversations
        with `turns: all` it may be several."""
        examples = [self._as_chat(example) for example in examples]
        chats = [example for example in examples if isinstance(example, Chat)]
        rendered = iter(self.render([example for example in examples if not isinstance(example, Chat)]))
        written = iter(self._conversations_of(chats) if chats else [])
        singles = ([each] if isinstance(each, Sample) else each for each in rendered)
        return [next(written) if isinstance(example, Chat) else next(singles) for example in examples]

    @property
    def changes(self) -> set[str]:
        """See `formats.CHANGES`."""
        return self._conversations.changes

    @property
    def bos_matters(self) -> bool:
        """Whether `data.bos` makes a difference to what was rendered so far."""
        return self.has_written_plain and self.adds_tokens

    def judged(
        self, prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]
    ) -> list[Sample | RowError]:
        """What a reward model reads of responses, judged at the last token: the sequence
        that a pair of its training would hold.

        A response that was cut off (not `ended`) stands there without the end that it does not have: the prompt,
        and the tokens of its text.
        """
        asked = list(zip(prompts, responses, ended, strict=True))
        whole = iter(self._whole([_answered(prompt, response) for prompt, response, is_whole in asked if is_whole]))
        cut = iter(self._cut_off([(prompt, response) for prompt, response, is_whole in asked if not is_whole]))
        return [next(whole) if is_whole else next(cut) for _, _, is_whole in asked]

    def _whole(self, answers: Sequence[Answer]) -> list[Sample | RowError]:
        """Answers without a mask. One whose tokens the template does not show apart from its prompt is the text
        that the template writes."""
        rendered = self.render(answers)
        for place, each in enumerate(rendered):
            chat = self._as_chat(answers[place])
            if isinstance(each, RowError) and isinstance(chat, Chat):
                (rendered[place],) = self._chats([replace(chat, loss_turns=())])
        return rendered

    def _cut_off(self, asked: Sequence[tuple[Prompt, str]]) -> list[Sample | RowError]:
        rendered = self.render([prompt for prompt, _ in asked])
        for place, (prompt, (_, response)) in enumerate(zip(rendered, asked, strict=True)):
            if isinstance(prompt, Sample):
                ids = np.append(prompt.ids, np.array(self._continuation(response)[0], np.uint32))
                rendered[place] = Sample(ids, np.arange(len(ids)) == len(ids) - 1)
        return rendered

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say, without special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def tokenizer_rows(self) -> int:
        """Rows that an embedding needs for every token of the tokenizer."""
        return rows_for(self.tokenizer)

    def chat_template(self, tools: list[dict[str, Any]] | None = None) -> str:
        """The Jinja text that chats are rendered with; what generation should use afterwards, too."""
        if self._setting == "none":
            message = "none is for prompt_completion with plain texts; conversations need auto, a name or a file"
            raise InputError.of("", message, what="data.template")
        template = self._named
        if template is None and self.tokenizer.chat_template:
            template = _own_template(self.tokenizer, tools)
        if template is None:
            self._note("the tokenizer has no chat template; conversations are written with the template `plain`")
            template = templates.PLAIN
        fixed = _with_fixed_date(template)
        if fixed != template:
            self._note(
                f"the chat template writes today's date; it is fixed at {FIXED_DATE} so that runs can be repeated"
            )
        return fixed

    # ── texts, and prompts with completions ──

    def _texts(self, texts: Sequence[Text]) -> list[Sample | RowError]:
        return [self._ended(ids, learnt_from=0) for ids in self._ids([text.text for text in texts])]

    def _completions(self, pairs: Sequence[PromptCompletion]) -> list[Sample | RowError]:
        """Prompt + completion + EOS. The prompt's tokens are those that inference sees.

        The two texts are tokenized as one. Where that changes the prompt's own tokens, because a token would straddle
        the boundary, prompt and completion are tokenized apart.
        """
        self._note_unused_template()
        prompts = self._ids([pair.prompt for pair in pairs])
        wholes = self._ids([pair.prompt + pair.completion for pair in pairs])
        results: list[Sample | RowError] = []
        for pair, prompt, whole in zip(pairs, prompts, wholes, strict=True):
            straddles = whole[: len(prompt)] != prompt
            ids = prompt + self._continuation(pair.completion)[0] if straddles else whole
            results.append(self._ended(ids, learnt_from=len(prompt)))
        return results

    def _ended(self, ids: list[int], learnt_from: int) -> Sample:
        """A plain text with what stands around it. `learnt_from` counts the text's own tokens."""
        begun = self._begun(ids)
        closing = self._closing
        if ids[-len(closing) :] == closing:
            self._note("some texts end with the tokenizer's EOS already; it is not doubled")
            self._conversations.changes.add(EOS)
            closing = []
        ids_T = np.array(begun + closing, np.uint32)
        return Sample(ids_T, np.arange(len(ids_T)) >= max(learnt_from + len(begun) - len(ids), 1))

    def _begun(self, ids: list[int]) -> list[int]:
        """The tokens of a plain text behind what `tokenizer(text)` puts before it,
        once: some rows begin with BOS as text."""
        self.has_written_plain = True
        if not self._prefix:
            return ids
        if ids[: len(self._prefix)] == self._prefix:
            self._note("some texts begin with the tokenizer's BOS already; it is not doubled")
            return ids
        return self._prefix + ids

    def _note_unused_template(self) -> None:
        if self._setting == "auto" and not self.in_turns and self.tokenizer.chat_template:
            self._note(
                "the tokenizer has a chat template, but it is not used for these prompts, which are plain texts. "
                "Set data.template: tokenizer to format them as turns of a conversation, or data.template: none to "
                "keep them as they are without this note"
            )

    def _pairs(self, pairs: Sequence[Pair]) -> list[Sample | RowError]:
        """The chosen answer's sequence, then the rejected one's. A sequence is judged at its last token."""
        sides: list[Answer] = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        rendered = self.render(sides)
        return [
            _joined(chosen, rejected, pair.margin)
            for pair, chosen, rejected in zip(pairs, rendered[::2], rendered[1::2], strict=True)
        ]

    def _prompts(self, prompts: Sequence[Prompt]) -> list[Sample | RowError]:
        """What inference sees before the answer begins."""
        texts = [self._prompt_text(prompt.content) for prompt in prompts]
        all_ids = iter(self._ids([text for text in texts if isinstance(text, str)]))
        if any(isinstance(prompt.content, Chat) for prompt in prompts):
            self._check_end()
        results: list[Sample | RowError] = []
        for prompt, text in zip(prompts, texts, strict=True):
            if isinstance(text, RowError):
                results.append(text)
                continue
            ids = self._begun(next(all_ids)) if isinstance(prompt.content, str) else next(all_ids)
            results.append(Sample(np.array(ids, np.uint32), np.arange(len(ids)) == len(ids) - 1))
        return results

    def _prompt_text(self, content: str | Chat) -> str | RowError:
        if isinstance(content, str):
            self._note_unused_template()
            return content
        self.has_written_chats = True
        try:
            text = self._write(content, self.chat_template(content.tools), len(content.messages), prompt=True)
            text.encode()
        except InputError:
            raise
        except UnicodeEncodeError:
            return RowError("half of a surrogate pair is not text")
        except (
            Exception
        ) as error:  # a template is a program: it raises on purpose, or trips over what it did not expect
            return RowError(f"the chat template refuses this conversation: {one_line(error)}")
        return text

    # ── chats ──

    def _as_chat(self, example: Example) -> Example:
        """Prompts that are texts, with their answers if they have one,
        are a conversation where a prompt is a user's turn."""
        is_prompt = isinstance(example, Prompt) and isinstance(example.content, str)
        if not (is_prompt or isinstance(example, PromptCompletion)):
            return example
        assert isinstance(example, Prompt | PromptCompletion)
        if not self.in_turns:
            if example.system:
                self._note(
                    "column `system` is not read: plain texts have no place for it; data.template: tokenizer, or one "
                    "that is named, puts the rows into turns, with it"
                )
            return example
        if example.system:
            self._conversations.changes.add("system")
        if isinstance(example, PromptCompletion):
            return _conversation(example.system, example.prompt, example.completion)
        return Prompt(_conversation(example.system, str(example.content)))

    def _chats(self, chats: Sequence[Chat]) -> list[Sample | RowError]:
        """One sequence of each: the one that ends with the last answer."""
        return [each if isinstance(each, RowError) else each[-1] for each in self._conversations_of(chats)]

    def _conversations_of(self, chats: Sequence[Chat]) -> list[list[Sample] | RowError]:
        """The sequences of each conversation, see `Conversations.learned`."""
        self.has_written_chats = True
        written = [self._conversations.learned(chat, self.chat_template(chat.tools)) for chat in chats]
        texts = [one.text for each in written if not isinstance(each, RowError) for one in each]
        encodings = iter(self._encode(texts))
        self._check_end()
        return [
            each if isinstance(each, RowError) else [self._masked(one, next(encodings)) for one in each]
            for each in written
        ]

    def _write(self, chat: Chat, template: str, count: int, prompt: bool = False) -> str:
        """The first `count` messages; with `prompt`, up to where the assistant begins to speak."""
        return self._conversations.write(chat, template, count, prompt)

    def _masked(self, written: Written, encoding: Any) -> Sample:
        """A token is learnt if it starts inside a span.

        As for pairs, the prompt's tokens are those that inference sees: where a token would straddle the start of a
        span, the text is cut there and the parts are tokenized apart. (With offsets that leave out spaces, a token of
        spaces only is an empty range at its end; `ends > start` keeps such a one, just before a span, out of it.)
        """
        text, spans, left_out = written
        ids, starts, ends = encoding.ids, *_offsets(encoding)
        cuts = [start for start, _ in spans if ((starts < start) & (ends > start)).any()]
        if cuts:
            ids, starts, ends = self._encode_cut(text, cuts)
        targets = np.zeros(len(ids), np.bool_)
        for start, end in spans:
            targets |= (starts >= start) & (starts < end) & (ends > start)
        targets[:1] = False
        return Sample(np.array(ids, np.uint32), targets, left_out=left_out)

    # ── tokens ──

    def _encode(self, texts: list[str]) -> list[Any]:
        """Encodings without the tokenizer's own BOS and EOS: a template writes its own, and never twice."""
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The same without offsets, which is faster."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_cut(self, text: str, cuts: list[int]) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
        first = self._encode([text[: cuts[0]]])[0]
        ids, all_starts, all_ends = list(first.ids), *([offsets] for offsets in _offsets(first))
        for start, end in pairwise([*cuts, len(text)]):
            piece, starts, ends = self._continuation(text[start:end])
            ids += piece
            all_starts.append(starts + start)
            all_ends.append(ends + start)
        return ids, np.concatenate(all_starts), np.concatenate(all_ends)

    def _continuation(self, text: str) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of a text that goes on from another, with their offsets.

        Tokenizers of the SentencePiece kind put a space before the first word of whatever they are given. A line break
        in front, removed afterwards, keeps it away.
        """
        skip = len(self._newline)
        encoding = self._encode(["\n" + text])[0]
        if encoding.ids[:skip] == self._newline:
            starts, ends = _offsets(encoding)
            return encoding.ids[skip:], starts[skip:] - 1, ends[skip:] - 1
        encoding = self._encode([text])[0]
        return encoding.ids, *_offsets(encoding)

    def _check_syntax(self, template: str) -> None:
        from jinja2 import TemplateError, TemplateSyntaxError

        greeting = Chat([{"role": "user", "content": "Hi"}], loss_turns=())
        try:
            self._write(greeting, template, 1, prompt=True)
        except TemplateSyntaxError as error:
            message = f"{self._setting}, line {error.lineno}: {error.message}"
            raise InputError.of("", message, what="data.template") from error
        except TemplateError:
            return  # a template may refuse this conversation and take those of the data
        except Exception as error:  # whatever else a template can do, such as include another one
            message = f"{self._setting} cannot be rendered: {one_line(error)}"
            raise InputError.of("", message, what="data.template") from error

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _own_template(tokenizer: Any, tools: list[dict[str, Any]] | None) -> str:
    """The tokenizer's chat template. Raises InputError if it has several and none for conversations as these."""
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template)) if isinstance(tokenizer.chat_template, dict) else "none"
        message = (
            f"the tokenizer has chat templates of the names {names} and no default; save one of them as a Jinja file "
            "and name that"
        )
        raise InputError.of("", message, what="data.template") from error


def _frame(tokenizer: Any, bos: str) -> tuple[list[int], list[int]]:
    """What stands before a plain text, and behind it: one EOS, whoever adds it."""
    before, behind = added_tokens(tokenizer) if bos == "auto" else ([], [])
    eos = tokenizer.eos_token_id
    return before, behind if behind[-1:] == [eos] else [*behind, eos]


def _answered(prompt: Prompt, response: str) -> Answer:
    """A prompt with its answer, as a row of a reward model's training would hold it."""
    if isinstance(prompt.content, str):
        return PromptCompletion(prompt.content, response, prompt.system)
    messages = [*prompt.content.messages, {"role": "assistant", "content": response}]
    turns = tuple(place for place, message in enumerate(messages) if place and message["role"] == "assistant")
    return Chat(messages, turns, prompt.content.tools)


def _conversation(system: str, question: str, answer: str | None = None) -> Chat:
    """A question, with its answer if there is one, behind the system message if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if answer is None:
        return Chat(messages, loss_turns=())
    return Chat([*messages, {"role": "assistant", "content": answer}], loss_turns=(len(messages),))


def _joined(chosen: Sample | RowError, rejected: Sample | RowError, margin: float) -> Sample | RowError:
    if isinstance(chosen, RowError):
        return chosen
    if isinstance(rejected, RowError):
        return rejected
    if len(chosen.ids) == len(rejected.ids) and (chosen.ids == rejected.ids).all():
        return RowError("chosen and rejected are the same tokens: nothing is preferred")
    ids = np.concatenate([chosen.ids, rejected.ids])
    last = np.zeros(len(ids), np.bool_)
    last[[len(chosen.ids) - 1, -1]] = True
    return Sample(ids, last, margin)


def sides_of(ids: NDArray[Any], targets: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The two sequences of a pair. [T] -> [C], [T - C]"""
    cut = int(np.flatnonzero(targets)[0]) + 1
    return ids[:cut], ids[cut:]


def _offsets(encoding: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last-plus-one character of every token, each [T]."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]


@functools.lru_cache
def _with_fixed_date(template: str) -> str:
    """The template with today's date replaced: the same job gives the same tokens on any day."""
    return TODAY_CALL.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)


def fitted(sample: Sample, max_length: int, overlong: str) -> list[Sample]:
    """The samples of at most `max_length` tokens that a sample gives: itself, if it is not longer.

    A longer one: none if `overlong` is `drop`; its beginning if it is `truncate`, without an EOS that was not there,
    perhaps without targets; all of it in pieces if it is `split`, each beginning with the last token of the one before,
    so that every target is learnt once.
    """
    if len(sample.ids) <= max_length:
        return [sample]
    if overlong == "drop":
        return []
    stride = max_length - 1
    starts = range(0, len(sample.ids) - 1, stride) if overlong == "split" else (0,)
    pieces = [(sample.ids[start : start + max_length], sample.targets[start : start + max_length]) for start in starts]
    return [Sample(ids, targets & (np.arange(len(ids)) > 0)) for ids, targets in pieces]


def fitted_pair(sample: Sample, max_length: int) -> list[Sample]:
    """The pair, unless one of its sequences is longer than `max_length`: a cut answer would be
    judged by its beginning."""
    return [sample] if max(map(len, sides_of(sample.ids, sample.targets))) <= max_length else []
