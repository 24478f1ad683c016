"""Computes the rewards of responses: by a reward model, a Python function or an HTTP endpoint, each a
`RewardScorer`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import PPO, RewardSource
from training.data.formats import Parser, Prompt
from training.data.model_renderer import renderer_for
from training.data.render import Sample
from training.data.reward_signature import prompt_column
from training.data.row_errors import RowError
from training.models.scoring import score
from training.process.distributed import RankInfo
from training.rl.experience import Response
from training.rl.reward_functions import RewardEndpoint, RewardError, RewardFunction
from training.rl.shared_base import reward_model

RewardScorer = Callable[[Sequence[Response]], list[float]]


def opened(source: RewardSource, phase: PPO, rank_info: RankInfo) -> RewardScorer:
    """The judge that a source names. Raises InputError if there is no such thing."""
    if source.is_endpoint:
        return _checked(RewardEndpoint(source, prompt_column(phase)), source)
    if source.is_function:
        return _checked(RewardFunction(source, prompt_column(phase)), source)
    return _checked(_RewardModel(source.path, phase, rank_info), source)


def _checked(judge: RewardScorer, source: RewardSource) -> RewardScorer:
    def judged(responses: Sequence[Response]) -> list[float]:
        scores = _as_list(judge(responses))
        if not isinstance(scores, list | tuple) or len(scores) != len(responses):
            got = f"{len(scores)}" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
            raise RewardError(f"the reward {source.path} was asked for {len(responses)} scores and gave {got}")
        return [_score(one, source, response) for response, one in zip(responses, scores, strict=True)]

    return judged


def _as_list(scores: Any) -> Any:
    """Arrays and tensors of one dimension as lists, [n, 1], as models give, too;
    and what else gives one score after the other."""
    if isinstance(scores, np.ndarray | torch.Tensor):
        flat = scores.reshape(-1) if scores.ndim == 2 and scores.shape[1] == 1 else scores
        return flat.tolist() if flat.ndim == 1 else scores
    return list(scores) if isinstance(scores, Iterable) and not isinstance(scores, str | bytes | Mapping) else scores


def _score(given: Any, source: RewardSource, response: Response) -> float:
    """One score, also of True and False; NaN for None, which says that the reward does not apply to this response."""
    if given is None:
        return math.nan
    number = given
    if isinstance(given, np.generic | np.ndarray | torch.Tensor):
        values = given.reshape(-1).tolist()
        number = values[0] if len(values) == 1 else given
    with suppress(OverflowError):  # of an integer that no float can hold
        if isinstance(number, int | float) and math.isfinite(number):
            return float(number)
    raise RewardError(
        f"the reward {source.path} gave {_shown(given)} for the response {response.text[:200]!r}; expected a finite "
        "number"
    )


def _shown(given: Any) -> str:
    try:
        return repr(given)[:200]
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"


def total(scores: Sequence[tuple[float, list[float]]], responses: Sequence[Response]) -> NDArray[np.float64]:
    """The weighted sum of all rewards of each response, [N]; those that do not apply to it are left out, as TRL does.

    Raises RewardError for a response that none applies to.
    """
    weighted_SN = np.array([[weight * one for one in given] for weight, given in scores]).reshape(len(scores), -1)
    unscored = np.isnan(weighted_SN).all(axis=0)
    if unscored.any():
        response = responses[int(np.flatnonzero(unscored)[0])]
        raise RewardError(
            f"no reward gave a number for the response {response.text[:200]!r} to "
            f"{json.dumps(response.row, default=str)[:200]}; None means that a reward does not apply, and one of them "
            "has to"
        )
    total_N: NDArray[np.float64] = np.nansum(weighted_SN, axis=0)
    return total_N


class _RewardModel:
    """A sequence classifier with one label. It reads what the policy wrote as text,
    in its own tokens, as in its training."""

    def __init__(self, path: str, phase: PPO, rank_info: RankInfo):
        self.lm, self.head, self.ready = reward_model(path, phase, rank_info)
        self.renderer = renderer_for(path, trust_remote_code=phase.model.trust_remote_code)
        self.parse = Parser("prompts", phase.data.columns, ("prompts",))

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        rendered = self.renderer.judged(
            [self._prompt(response.row) for response in responses],
            [response.text for response in responses],
            [response.ended for response in responses],
        )
        if refused := [each for each in rendered if isinstance(each, RowError)]:
            raise RewardError(f"a response cannot be put to the reward model: {refused[0]}")
        self.ready()
        return score(self.lm, [each.ids for each in rendered if isinstance(each, Sample)], head=self.head)

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        """The prompt of a row as the policy has it: parts of a message joined, tool calls as objects."""
        _, example = self.parse(row)
        assert isinstance(example, Prompt), "PPO reads prompts"
        return example
