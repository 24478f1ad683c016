"""The renderer for a model in a folder: prompts, and the sequences of a reward model, have the form that it was
trained on."""

from __future__ import annotations

from typing import Any

from training.config import Model
from training.data.render import Renderer, load_tokenizer
from training.data.turn_end import stop_tokens
from training.errors import InputError
from training.model_folder import recorded_info, tokenizer_of


def renderer_for(path: str, template: str = "auto", *, trust_remote_code: bool = False) -> Renderer:
    """`template`: whether a question is a user's turn (chat), stands as it is (plain), or is put as the model has
    learnt it (auto). `trust_remote_code`: whether Python code that comes with the tokenizer may run.

    Raises InputError for a model without chat template that is to chat.
    """
    tokenizer = load_tokenizer(tokenizer_of(Model(path=path)), trust_remote_code)
    info = recorded_info(path)
    if template == "auto":
        template = _learnt_questions(info, tokenizer)
    if template == "chat" and not tokenizer.chat_template:
        raise InputError.of(
            path, "the tokenizer has no chat template; ask it plainly (without --chat, or with --template plain)"
        )
    return Renderer(tokenizer, bos=_learnt_bos(info), in_turns=template == "chat")


def stop_tokens_of(path: str, renderer: Renderer, generation: Any) -> list[int]:
    """The tokens that end a response of a model: see `stop_tokens`.
    What it was trained to end answers with is among them."""
    has_turns = renderer.in_turns or bool(renderer.tokenizer.chat_template)
    return stop_tokens(renderer, generation, chats=has_turns, known=recorded_info(path).get("stop_tokens", ()))


def _learnt_questions(info: dict[str, Any], tokenizer: Any) -> str:
    """What Muster wrote beside the model; of a model of another make, whether it has a chat template."""
    return info.get("questions") or ("chat" if tokenizer.chat_template else "plain")


def _learnt_bos(info: dict[str, Any]) -> str:
    """Models of versions without `data.bos` have learnt plain texts without BOS."""
    return str(info.get("bos", "none" if info else "auto"))
