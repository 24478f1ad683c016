"""Settings of a phase: strict, frozen, and refused together when they cannot go together."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from training.config import SFT, IncompatibleSettings, Phase, Settings

DRAFT = {"recipe": "sft", "model": {"path": "m"}, "data": {"train": "d.jsonl"}}


def phase(**settings) -> SFT:
    return SFT.model_validate({**DRAFT, **settings})


def impossible(**settings) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as caught:
        phase(**settings)
    cause = caught.value.errors()[0]["ctx"]["error"]
    assert isinstance(cause, IncompatibleSettings)
    return cause.problems


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"epochs": 1.0, "max_steps": 3}, "max_steps", "exclude each other"),
        ({"micro_batch": 2, "micro_tokens": 4096}, "micro_batch", "exclude each other"),
        (
            {"batch": 2, "resources": {"workers": 3}},
            "batch",
            "2 samples cannot be dealt to 3 workers; choose batch >= 3",
        ),
        ({"checkpoint": {"best": {}}}, "checkpoint.best", "needs data.eval"),
        ({"micro_tokens": 100}, "micro_tokens", "smaller than data.max_length 2048"),
        (
            {"checkpoint": {"every": "10m", "best": {}}, "data": {"train": "d.jsonl", "eval": "e.jsonl"}},
            "checkpoint.best",
            "set eval_every",
        ),
    ],
)
def test_settings_that_cannot_go_together(settings, key, words):
    ((found, message),) = impossible(**settings)
    assert found == key
    assert words in message


def test_all_impossible_combinations_are_told_at_once():
    assert len(impossible(epochs=1.0, max_steps=3, batch=1, resources={"workers": 2}, micro_tokens=8)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": "8"}, {"batch": 8.0}, {"batch": True}, {"batch": 0}, {"learning_rate": float("nan")},
        {"learning_rate": 0.0}, {"clip": -1.0}, {"seed": -1}, {"seed": 2**63}, {"sharding": {"stage": 4}},
        {"model": {"path": "m", "dtype": "fp16"}}, {"optimizer": {"betas": [0.9]}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"checkpoint": {"every": 0}}, {"checkpoint": {"every": True}}, {"checkpoint": {"every": "0s"}},
        {"checkpoint": {"every": "200"}}, {"checkpoint": {"every": "10 m"}}, {"checkpoint": {"every": "1d"}},
        {"data": {"train": []}}, {"data": {"train": "d", "max_length": 1}}, {"schedule": {"floor": 1.5}}, {"bach": 3},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_and_loose_types_are_refused(settings):
    with pytest.raises(ValidationError):
        phase(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"checkpoint": {"every": "2h"}}, {"clip": None}, {"learning_rate": 1}, {"micro_tokens": 2048}, {"epochs": 0.5}],
    ids=str,
)
def test_values_at_the_edge_are_taken(settings):
    phase(**settings)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        phase().batch = 3


def test_a_phase_survives_the_way_to_a_worker_and_back():
    before = phase(data={"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}], "eval": "c.jsonl"}, batch=8)
    assert SFT.model_validate(before.model_dump(by_alias=True)) == before


def subclasses(of: type[Settings]) -> list[type[Settings]]:
    return [found for child in of.__subclasses__() for found in (child, *subclasses(child))]


def test_every_recipe_is_in_the_table_with_settings_of_its_own():
    from training.recipes import RECIPES

    assert all(issubclass(recipe.config, Phase) for recipe in RECIPES.values())
    assert {recipe.config for recipe in RECIPES.values()} == set(Phase.__subclasses__())


def test_every_setting_with_a_special_value_says_what_it_means():
    """The reference pages are made of these texts."""
    for settings in [one for one in subclasses(Settings) if one.__module__ == "training.config"]:
        for name, field in settings.model_fields.items():
            if field.default == "auto" or (field.default is None and field.annotation is not None):
                assert field.description, f"{settings.__name__}.{name} has no text"
