"""The table of recipes. Import strings instead of imports, so that reading the table loads neither torch nor DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from training.config import SFT, Phase


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


RECIPES: dict[str, Recipe] = {
    "sft": Recipe(
        config=SFT,
        formats=("prompt_completion", "alpaca", "sharegpt", "messages"),
        run="training.recipes.supervised:run",
        roles={"trainer": "training.recipes.sft:SFTTrainer"},
    ),
}


def resolve(target: str) -> Any:
    """The object that an import string such as `training.recipes.supervised:run` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
