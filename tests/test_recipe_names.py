"""Only the table of recipes knows a recipe by name, so a new recipe changes no other module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.config import Phase
from training.recipes import RECIPES

ROOT = Path(__file__).parent.parent
TABLE = ("training/recipes.py", "training/config.py")
OWN = ("training/rl/", "training/drivers/ppo.py")
"""Modules of one recipe."""
SETTINGS = {recipe.config.__name__ for recipe in RECIPES.values()}
OWN_KEYS = {key for recipe in RECIPES.values() for key in recipe.config.model_fields.keys() - Phase.model_fields.keys()}
"""Settings that not every phase has."""


def mentions_recipe(node: ast.AST) -> bool:
    """Whether `recipe` is read in an expression: a variable, an attribute or a key."""
    return any(
        "recipe" in (getattr(part, "id", None), getattr(part, "attr", None), getattr(part, "value", None))
        for part in ast.walk(node)
        if isinstance(part, ast.Name | ast.Attribute | ast.Constant)
    )


def names_recipe(node: ast.AST) -> bool:
    """Whether the name of a recipe stands in an expression as text."""
    return any(isinstance(part, ast.Constant) and part.value in RECIPES for part in ast.walk(node))


def is_table(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "RECIPES"


def violation(node: ast.AST) -> str | None:
    """What a piece of code knows of a single recipe, if it does."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) if name in SETTINGS:
            return f"the settings class {name}"
        case ast.Compare() if mentions_recipe(node) and names_recipe(node):
            return "a recipe compared with a name"
        case ast.Match(subject=subject, cases=cases) if mentions_recipe(subject):
            return "a recipe matched with a name" if any(names_recipe(case.pattern) for case in cases) else None
        case ast.keyword(arg="recipe", value=value) if names_recipe(value):
            return "a recipe given by name"
        case ast.Dict(keys=keys) if keys and len(keys) > 1:
            names = {key.value for key in keys if isinstance(key, ast.Constant)}
            return "a table by names of recipes" if len(names) == len(keys) and names <= RECIPES.keys() else None
        case ast.Subscript(value=value, slice=key) if not is_table(value) and isinstance(key, ast.Attribute):
            return "another table looked up by recipe" if key.attr == "recipe" else None
        case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[key, *_]) if not is_table(value):
            by_recipe = isinstance(key, ast.Name | ast.Attribute) and mentions_recipe(key)
            return "another table looked up by recipe" if by_recipe else None
        case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=key), *_]) if (
            key in OWN_KEYS
        ):
            return f"the setting {key}, which other recipes do not have"
    return None


def violations(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if what := violation(node):
            yield f"line {getattr(node, 'lineno', '?')}: {what}"


def test_no_other_module_knows_a_recipe_by_name():
    found = {}
    for package in ("launcher", "training", "cluster"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name not in TABLE and not name.startswith(OWN):
                found |= {f"{name}, {what}": what for what in violations(file.read_text())}
    assert list(found) == []


@pytest.mark.parametrize(
    "code",
    [
        "from training.config import PPO",
        "isinstance(phase, config.PPO)",
        'sides = 2 if phase.recipe == "reward" else 1',
        'small = recipe in ("sft", "cft")',
        'facts.get("recipe") == "cft"',
        'TARGETS = {"sft": 0.75, "cft": 0.75}',
        "TARGETS.get(phase.recipe, 1.0)",
        "TARGETS[phase.recipe]",
        'getattr(phase, "groups")',
        'match phase.recipe:\n    case "ppo":\n        pass',
        'phase_of(folder, recipe="ppo")',
    ],
)
def test_each_way_to_know_one_is_found(code):
    assert list(violations(code))


@pytest.mark.parametrize(
    "code",
    [
        "RECIPES[phase.recipe].run",
        "RECIPES.get(phase.recipe)",
        '{"policy": 1, "reward": 2}',
        'key == "reward"',
        "phase.reward_keys",
    ],
)
def test_the_table_and_settings_of_the_same_name_are_not(code):
    assert not list(violations(code))
