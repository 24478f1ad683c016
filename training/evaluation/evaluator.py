"""The role `evaluator`: a model that answers questions, or one that judges answers. No training, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Questions
from training.data.formats import Chat, Prompt
from training.data.model_renderer import renderer_for, stop_tokens_of
from training.data.question_prompts import unseen_notes
from training.data.questions import Question
from training.data.render import Sample
from training.data.row_errors import RowError
from training.data.vocabulary import beyond, embedding_rows
from training.errors import InputError, TrainingError
from training.evaluation.accuracy import Row
from training.evaluation.generated_answers import GenerationEval, by_answer
from training.generation.sampling import Continued, Heard, Sampling, generate_all
from training.model_folder import CLASSIFIER_SUFFIX, adapter_in, inspect, window_of
from training.models import loading as models
from training.models.scoring import score
from training.process.distributed import RankInfo


class Evaluator:
    """One worker's part in an evaluation. `template`: plain, chat, or auto, which is what the model has learnt.

    `trust_remote_code`: whether Python code that comes with the model may run.

    Raises InputError if the model cannot be loaded, or has no chat template to chat with.
    """

    def __init__(self, rank_info: RankInfo, path: str, template: str = "auto", trust_remote_code: bool = False):
        self.rank_info = rank_info
        self.model = TextGenerator(path, template, gpu=rank_info.local_rank, trust_remote_code=trust_remote_code)

    def answer(self, asked: Sequence[Question], settings: Questions, seed: int) -> list[Row]:
        """This worker's share of the responses, judged."""
        model = self.model
        asking = GenerationEval(renderer=model.renderer, seed=seed, settings=settings, stops=model.stops)
        return asking.answered(model.lm, asked, by_answer, (self.rank_info.rank, self.rank_info.size))

    def continued(self, prompts: Sequence[tuple[list[int], int]], settings: Sampling, batch: int) -> list[Continued]:
        """The continuations of prompts, each with its key."""
        return self.model.continued(prompts, settings, batch=batch)


class PromptCodec:
    """What a model reads and writes, between texts and tokens. Without its weights,
    so that prompts are checked before these load.

    Raises InputError for a template that the model does not have.
    """

    def __init__(self, path: str, template: str = "auto", *, trust_remote_code: bool = False):
        self.path = path
        self.renderer = renderer_for(path, template, trust_remote_code=trust_remote_code)
        self.chat = self.renderer.in_turns
        """Whether a text is a user's turn."""
        self.window = window_of(path)
        """How many positions the model has, if it says."""
        self.rows = embedding_rows(path)

    def ids(self, content: str | Chat | Prompt) -> list[int]:
        """The tokens of a prompt that leave room for a response. Raises RowError for one
        that cannot be put to the model."""
        ids = self.tokens(content)
        if not ids:
            raise RowError("the prompt comes to no tokens; give it some text")
        if wrong := beyond(ids, self.rows, self.renderer.tokenizer):
            raise RowError(wrong)
        if self.window is not None and len(ids) >= self.window:
            raise RowError(
                f"the prompt has {len(ids):,} tokens, the model has {self.window:,} positions for it and the response; "
                "shorten it"
            )
        return ids

    def tokens(self, content: str | Chat | Prompt) -> list[int]:
        """The tokens of a conversation, or of a text, which is a user's turn if the model is
        to chat. Raises RowError."""
        prompt = content if isinstance(content, Prompt) else Prompt(content)
        content = prompt.content
        if isinstance(content, Chat) and not self.renderer.tokenizer.chat_template:
            raise RowError(f"the prompt is a list of messages, and {self.path} has no chat template; give it as text")
        if isinstance(content, str):
            try:
                content.encode()
            except UnicodeEncodeError:
                raise RowError("the prompt is not UTF-8 text") from None
        (sample,) = self.renderer.render([prompt])
        if isinstance(sample, RowError):
            raise sample
        tokens: list[int] = sample.ids.tolist()
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without special ones."""
        return self.renderer.text(tokens)

    @property
    def notes(self) -> list[str]:
        """Notes on parts of prompts that the model does not see."""
        return unseen_notes(self.renderer.notes)


class TextGenerator(PromptCodec):
    """A language model ready to be asked."""

    def __init__(self, path: str, template: str = "auto", *, gpu: int = 0, trust_remote_code: bool = False):
        super().__init__(path, template, trust_remote_code=trust_remote_code)
        self.lm: Any = models.for_inference(path, gpu=gpu, trust_remote_code=trust_remote_code)
        self.stops = stop_tokens_of(path, self.renderer, self.lm.generation_config)
        """The tokens that end a response."""

    def continued(
        self,
        prompts: Sequence[tuple[list[int], int]],
        settings: Sampling,
        *,
        batch: int = 1,
        heard: Heard | None = None,
    ) -> list[Continued]:
        """The continuations of prompts, each with its key, in as many positions as the model has."""
        ids, keys = [ids for ids, _ in prompts], [key for _, key in prompts]
        return generate_all(self.lm, ids, keys, self.stops, settings, batch=batch, window=self.window, heard=heard)


def require_reward_model(path: str, *, trust_remote_code: bool = False) -> None:
    """Raises InputError if the folder holds another kind of model. Reads no weights."""
    adapter = adapter_in(path)
    info = inspect(Path(path), classifier=True, trust_remote_code=trust_remote_code)
    if not info.architecture.endswith(CLASSIFIER_SUFFIX) and not (adapter and adapter.heads):
        message = "is no reward model (a sequence classifier with one label); the recipe `reward` trains one"
        raise InputError.of(path, message)


class RewardScorer:
    """A reward model. Raises InputError if the folder holds another kind of model."""

    def __init__(self, path: str, *, trust_remote_code: bool = False):
        require_reward_model(path, trust_remote_code=trust_remote_code)
        self.lm = models.for_inference(path, classifier=True, trust_remote_code=trust_remote_code)
        self.renderer = renderer_for(path, trust_remote_code=trust_remote_code)

    @property
    def chat(self) -> bool:
        """Whether a question that is a text is put as a user's turn."""
        return self.renderer.in_turns

    def rewards(
        self, prompts: Sequence[str | Prompt], responses: Sequence[str], ended: Sequence[bool] | None = None
    ) -> list[float]:
        """One number for each response to its prompt. `ended`: whether a response was ended,
        not cut off; None: all were."""
        asked = [Prompt(each) if isinstance(each, str) else each for each in prompts]
        rendered = self.renderer.judged(asked, responses, ended or [True] * len(responses))
        if refused := [each for each in rendered if isinstance(each, RowError)]:
            raise TrainingError(f"a response cannot be put to the reward model: {refused[0]}")
        return score(self.lm, [each.ids for each in rendered if isinstance(each, Sample)])
