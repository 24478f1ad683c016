"""What responses are worth: a reward model, a Python function, an HTTP endpoint. All of them are `Judge`s."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import PPO, Model, RewardSource
from training.data.files import RowError
from training.data.formats import Answer, Chat, Prompt, PromptCompletion
from training.data.render import Renderer, Sample, load_tokenizer, same_tokens, tokenizer_for
from training.distributed import Seat
from training.modelfiles import facts_in, tokenizer_of
from training.recipes.reward import score
from training.reward_signature import prompt_column
from training.rl.base import of_reward
from training.rl.experience import Response
from training.rl.reward_functions import RewardEndpoint, RewardError, RewardFunction

Judge = Callable[[Sequence[Response]], list[float]]


def opened(source: RewardSource, phase: PPO, seat: Seat) -> Judge:
    """The judge that a source names. Raises InputError if there is no such thing."""
    if source.is_endpoint:
        return _checked(RewardEndpoint(source, prompt_column(phase)), source)
    if source.is_function:
        return _checked(RewardFunction(source, prompt_column(phase)), source)
    return _checked(_RewardModel(source.path, phase, seat), source)


def _checked(judge: Judge, source: RewardSource) -> Judge:
    def judged(responses: Sequence[Response]) -> list[float]:
        scores = _as_list(judge(responses))
        if not isinstance(scores, list | tuple) or len(scores) != len(responses):
            got = f"{len(scores)}" if hasattr(scores, "__len__") else f"a {type(scores).__name__}"
            raise RewardError(f"the reward {source.path} was asked for {len(responses)} scores and gave {got}")
        return [_score(one, source, response) for response, one in zip(responses, scores, strict=True)]

    return judged


def _as_list(scores: Any) -> Any:
    """Arrays and tensors of one dimension as lists; [n, 1], as models give, counts as one."""
    if isinstance(scores, np.ndarray | torch.Tensor):
        flat = scores.reshape(-1) if scores.ndim == 2 and scores.shape[1] == 1 else scores
        return flat.tolist() if flat.ndim == 1 else scores
    return scores


def _score(given: Any, source: RewardSource, response: Response) -> float:
    """One score; NaN for None, which says that the reward does not apply to this response."""
    if given is None:
        return math.nan
    number = given
    if isinstance(given, np.generic | np.ndarray | torch.Tensor):
        values = given.reshape(-1).tolist()
        number = values[0] if len(values) == 1 else given
    if isinstance(number, bool | str) or not isinstance(number, int | float) or not math.isfinite(number):
        raise RewardError(
            f"the reward {source.path} gave {given!r} for the response {response.text[:200]!r}; expected a finite number"
        )
    return float(number)


def total(scores: Sequence[tuple[float, list[float]]], responses: Sequence[Response]) -> NDArray[np.float64]:
    """The weighted sum of all rewards of each response, [N]; those that do not apply to it are left out, as TRL does.

    Raises RewardError for a response that none applies to.
    """
    weighted_SN = np.array([[weight * one for one in given] for weight, given in scores]).reshape(len(scores), -1)
    unscored = np.isnan(weighted_SN).all(axis=0)
    if unscored.any():
        response = responses[int(np.flatnonzero(unscored)[0])]
        raise RewardError(
            f"no reward gave a number for the response {response.text[:200]!r} to {json.dumps(response.row, default=str)[:200]}; "
            "None means that a reward does not apply, and one of them has to"
        )
    return np.nansum(weighted_SN, axis=0)


class _RewardModel:
    """A sequence classifier with one label. What the policy wrote is rendered anew where the two do not write alike."""

    def __init__(self, path: str, phase: PPO, seat: Seat):
        self.lm, self.head, self.ready = of_reward(path, phase, seat)
        tokenizer: Any = load_tokenizer(tokenizer_of(Model(path=path)))
        policy: Any = tokenizer_for(phase.model)
        self.same_words = same_tokens(tokenizer, policy)
        self.in_turns = facts_in(path).get("questions") == "chat"
        self.renderer = Renderer(tokenizer)
        self.column = prompt_column(phase)

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        sequences = [self._ids(response) for response in responses]
        self.ready()
        return score(self.lm, sequences, head=self.head)

    def _ids(self, response: Response) -> NDArray[Any]:
        asked = self._asked(response.row[self.column])
        (prompt,) = self.renderer.render([Prompt(asked)])
        if self.same_words and isinstance(prompt, Sample) and np.array_equal(prompt.ids, response.prompt):
            return np.concatenate([response.prompt, response.tokens])
        whole: Answer
        if isinstance(asked, str):
            whole = PromptCompletion(asked, response.text)
        else:
            answer = {"role": "assistant", "content": response.text}
            whole = Chat([*asked.messages, answer], (len(asked.messages),), asked.tools)
        (sample,) = self.renderer.render([whole])
        if isinstance(sample, RowError):
            raise RewardError(f"a response cannot be put to the reward model: {sample}")
        return sample.ids

    def _asked(self, given: Any) -> str | Chat:
        """A prompt in the form that the reward model has learnt."""
        if isinstance(given, list):
            return Chat(given, ())
        return Chat([{"role": "user", "content": given}], ()) if self.in_turns else given
