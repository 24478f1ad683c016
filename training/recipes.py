"""The table of recipes. Import strings instead of imports, so
that reading the table loads neither torch nor DeepSpeed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from training import metric_schema
from training.config import CFT, PPO, SFT, Phase, Pretrain, Reward
from training.metric_schema import Columns, Metric

_ANSWERS = ("eval_accuracy", "eval_verdict_accuracy")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row of the table."""

    config: type[Phase]
    """Settings of a phase of this recipe."""
    formats: tuple[str, ...]
    """Row formats that it can learn from, the likeliest first."""
    run: str
    """The driver: a function of (phase, group, hooks) that asks groups to do short calls."""
    roles: dict[str, str]
    """Class of each role, by role name; a worker builds it."""
    metrics: Columns
    """What its phases measure."""
    exports: str = ""
    """Prefix, in checkpoints of several roles, of the parameters that the phase ends with."""
    is_classifier: bool = False
    """Whether its phases train a model with a scalar head, in place of a causal language model."""
    memory: str = "training.estimate.memory:of_trainer"
    """What a worker holds: a function of (phase, roles, models, setting) that returns `Needs`."""
    layouts: str = ""
    """Ways to place the roles on the workers: a function of the phase that yields pairs of a description and the
    groups. Empty: there is one way."""
    shows_learning: tuple[str, ...] = ("loss", "eval_loss", *_ANSWERS)
    """Metrics that show whether a model learns, the most important first."""

    @property
    def reads_documents(self) -> bool:
        """Whether a text file is a row."""
        return "text" in self.formats

    @property
    def learns_critiques(self) -> bool:
        """Whether its models learn to write critiques."""
        return "critique" in self.formats


_SUPERVISED = "training.drivers.supervised:run"
RECIPES: dict[str, Recipe] = {
    "pretrain": Recipe(
        config=Pretrain,
        formats=("text",),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.language:LanguageTrainer"},
        metrics=metric_schema.LANGUAGE,
    ),
    "sft": Recipe(
        config=SFT,
        formats=("prompt_completion", "alpaca", "sharegpt", "messages"),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.language:LanguageTrainer"},
        metrics=metric_schema.LANGUAGE,
    ),
    "cft": Recipe(
        config=CFT,
        formats=("critique", "alpaca"),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.language:LanguageTrainer"},
        metrics=metric_schema.LANGUAGE,
    ),
    "reward": Recipe(
        config=Reward,
        formats=("sharegpt_preference", "preference"),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.reward:RewardTrainer"},
        is_classifier=True,
        metrics=metric_schema.PAIRS,
        shows_learning=("loss", "eval_loss", "eval_accuracy"),
    ),
    "ppo": Recipe(
        config=PPO,
        formats=("prompts",),
        exports="policy/",
        run="training.drivers.ppo:run",
        memory="training.rl.memory:of_roles",
        layouts="training.rl.layouts:layouts",
        metrics=metric_schema.POLICY,
        shows_learning=("reward", *_ANSWERS),
        roles={
            "policy": "training.rl.policy:Policy",
            "reference": "training.rl.frozen_roles:Reference",
            "critic": "training.rl.critic:Critic",
            "reward": "training.rl.frozen_roles:RewardRole",
            "rollout": "training.rl.rollout:Rollout",
        },
    ),
}


def resolve(target: str) -> Any:
    """The object that an import string such as `training.drivers.supervised:run` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def metric(recipe: str, name: str) -> Metric | None:
    """What a column of a recipe is; None if nothing is known of it."""
    known = RECIPES[recipe].metrics if recipe in RECIPES else {}
    return known.get(re.sub(r"pass@\d+$", "pass@K", name))
