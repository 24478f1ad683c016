"""Which tokens end a response: found in what the renderer writes behind an answer,
not in the name of the tokenizer's EOS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from training.data.conversations import Conversations
from training.data.formats import Chat, Message
from training.data.row_errors import RowError

if TYPE_CHECKING:
    from training.data.render import Renderer, Sample

_ANSWERS = ("Yes", "Of course not")
"""Two answers with different ends: the tokens that both end with are the template's."""


@dataclass(frozen=True)
class TurnEnd:
    """How the chat template ends an assistant's turn."""

    token: int | None
    """The token that generation stops at; None: there is none."""
    note: str = ""
    """What the user should know of it."""
    after_calls: int | None = None
    """The token that ends a turn which calls tools, if it is another one (`<|eom_id|>`, `<|call|>`)."""


def turn_end(renderer: Renderer) -> TurnEnd:
    """The end of a turn as training renders it. Raises InputError if conversations cannot be rendered at all."""
    first, second = _answers(renderer)
    if isinstance(first, RowError) or isinstance(second, RowError):  # the prompt may begin thoughts, which these lack
        first, second = _answers(renderer, reasoning_content="Hm.")
    if isinstance(first, RowError) or isinstance(second, RowError):
        return TurnEnd(
            None, "where an answer ends cannot be found, because the chat template refuses a question with an answer; "
            "generation stops at the tokenizer's EOS",
        )  # fmt: skip
    found = _in_tokens(renderer.tokenizer, _common_end(first.ids.tolist(), second.ids.tolist()), first.targets.tolist())
    after_calls = _after_calls(renderer)
    return replace(found, after_calls=after_calls) if after_calls != found.token else found


def _answers(renderer: Renderer, **keys: str) -> list[Sample | RowError]:
    """The conversations of one question with each of `_ANSWERS`. `keys` are added to the answers' messages."""
    question = {"role": "user", "content": "Hi"}
    answers = [{"role": "assistant", "content": answer, **keys} for answer in _ANSWERS]
    return renderer.render([Chat([question, answer], (1,)) for answer in answers])


def _after_calls(renderer: Renderer) -> int | None:
    """The special token that a turn which calls a tool is learned to end with;
    None if there is none, or no tools at all."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}, "id": "abcdefghi"}
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    tools = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": parameters}}]
    messages: list[Message] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    silent = Conversations(renderer.tokenizer, "auto", lambda note: None)
    written = silent.learned(Chat(messages, (1,), tools), renderer.chat_template(tools))
    if isinstance(written, RowError) or not written[-1].spans:
        return None
    (start, end), text = written[-1].spans[-1], written[-1].text
    special = {renderer.tokenizer.convert_ids_to_tokens(token): token for token in _special(renderer.tokenizer)}
    ends = [token for token in special if text[start:end].endswith(token)]
    return special[max(ends, key=len)] if ends else None


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}


def _common_end(first: list[int], second: list[int]) -> list[int]:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]


def _in_tokens(tokenizer: Any, behind: list[int], targets: list[bool]) -> TurnEnd:
    """`behind`: the tokens behind an answer, with the white space that is not learnt;
    `targets`: what is learnt of the whole."""
    learnt = targets[len(targets) - len(behind) :]
    closing = [token for token, is_learnt in zip(behind, learnt, strict=True) if is_learnt]
    special = _special(tokenizer)
    token = next((token for token in behind if token in special), closing[0] if len(closing) == 1 else None)
    if token in closing:
        return TurnEnd(token)
    text = tokenizer.decode(behind).strip()
    if token is not None:
        return TurnEnd(
            token,
            f"the chat template ends an answer with {text!r}, which it does not mark as part of the answer, so nothing "
            "teaches the "
            "model to stop; put it inside {% generation %}",
        )
    if not closing:
        return TurnEnd(None, "the chat template writes nothing behind an answer, so nothing teaches the model to stop")
    return TurnEnd(
        None,
        f"the tokenizer has no token {text}, which the chat template ends an answer with: it becomes {len(closing)} "
        f"tokens, and generation cannot stop at it, only at {tokenizer.eos_token}; add the token to the tokenizer, or "
        "name another template",
    )


def stop_tokens(renderer: Renderer, generation: Any = None, *, chats: bool, known: Iterable[int] = ()) -> list[int]:
    """The tokens that end a response: those of the model's generation settings, the tokenizer's EOS,
    with `chats` the end of a turn.

    `known` are added to them. Each once, in this order.
    """
    named = getattr(generation, "eos_token_id", None)
    found = [*(named if isinstance(named, list) else [named]), renderer.tokenizer.eos_token_id, *known]
    if chats:
        end = turn_end(renderer)
        found += [end.token, end.after_calls]
    return list(dict.fromkeys(token for token in found if token is not None))
