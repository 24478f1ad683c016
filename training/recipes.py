"""The table of recipes. Import strings instead of imports, so
that reading the table loads neither torch nor DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from training.config import CFT, PPO, SFT, Phase, Pretrain, Reward


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
    exports: str = ""
    """Prefix, in checkpoints of several roles, of the parameters that the phase ends with."""
    makes: Literal["model", "classifier"] = "model"
    """What its phases end with: a causal language model, or one with a scalar head."""

    @property
    def reads_documents(self) -> bool:
        """Whether a text file is a row."""
        return "text" in self.formats


_SUPERVISED = "training.drivers.supervised:run"
RECIPES: dict[str, Recipe] = {
    "pretrain": Recipe(
        config=Pretrain,
        formats=("text",),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.language:LanguageTrainer"},
    ),
    "sft": Recipe(
        config=SFT,
        formats=("prompt_completion", "alpaca", "sharegpt", "messages"),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.language:LanguageTrainer"},
    ),
    "cft": Recipe(
        config=CFT,
        formats=("critique", "alpaca"),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.language:LanguageTrainer"},
    ),
    "reward": Recipe(
        config=Reward,
        formats=("sharegpt_preference", "preference"),
        run=_SUPERVISED,
        roles={"trainer": "training.roles.reward:RewardTrainer"},
        makes="classifier",
    ),
    "ppo": Recipe(
        config=PPO,
        formats=("prompts",),
        exports="policy/",
        run="training.drivers.ppo:run",
        roles={
            "policy": "training.rl.roles:Policy",
            "reference": "training.rl.roles:Reference",
            "critic": "training.rl.roles:Critic",
            "reward": "training.rl.roles:RewardRole",
            "rollout": "training.rl.roles:Rollout",
        },
    ),
}


def resolve(target: str) -> Any:
    """The object that an import string such as `training.drivers.supervised:run` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
