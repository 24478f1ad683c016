"""Settings by the names of other tools: whatever the section, the error has the name to use here."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.jobfile import job as jobs
from launcher.jobfile.job import TopLevel
from launcher.jobfile.other_tools import OTHER_NAMES, name_here
from launcher.jobfile.phase_builder import SHARED
from launcher.jobfile.validation_messages import all_keys
from launcher.jobfile.yaml_with_lines import dotted
from training.errors import InputError
from training.recipes import RECIPES

SETTINGS = {dotted(path) for recipe in RECIPES.values() for path in all_keys(recipe.config)}


def test_every_name_given_is_a_setting_and_none_of_the_names_it_replaces_is():
    for other, (path, _) in OTHER_NAMES.items():
        inside = path.removeprefix("phases.NAME.")
        assert not path or inside in SETTINGS or path in TopLevel.model_fields, other
        assert (
            path.startswith("phases.NAME.") or path in TopLevel.model_fields or not path or path.split(".")[0] in SHARED
        )
        assert other not in {key.rpartition(".")[2] for key in SETTINGS} | TopLevel.model_fields.keys()


def errors(text: str, *overrides: str) -> list[str]:
    Path("job.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        jobs.load(Path("job.yaml"), overrides)
    return str(caught.value).splitlines()


WANTED = (
    "per_device_train_batch_size", "num_train_epochs", "lora_r", "cutoff_len", "bf16", "zero_stage",
    "gradient_accumulation_steps", "output_dir", "Num-Train-Epochs",
)  # fmt: skip


@pytest.mark.parametrize("key", WANTED)
def test_the_name_to_use_is_told_wherever_the_key_stands(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    phase = "phases: {sft: {data: {train: rows.jsonl}"
    top = f"model: {{path: org/m}}\n{phase}}}}}\n"
    told = f"unknown key; {name_here(key)}"
    assert errors(f"{key}: 1\n{top}") == [f"job.yaml:1: {key}: {told}"]
    assert errors(f"model: {{path: org/m}}\n{phase}, {key}: 1}}}}\n") == [f"job.yaml:2: phases.sft.{key}: {told}"]
    for section in (
        "phases.sft.",
        "model.",
        "resources.",
        "sharding.",
        "phases.sft.data.",
        "phases.sft.model.lora.",
        "",
    ):
        assert errors(top, f"{section}{key}=1") == [f"command line: {section}{key}: {told}"]
    assert errors(top, f"phases.{key}=1") == [f"command line: phases.{key}: there is no phase {key}; {name_here(key)}"]
    assert name_here(key) in errors(f"model: {{path: org/m}}\n{phase}}}, {key}: 1}}\n")[0]


def test_why_the_value_differs_is_told():
    assert "does not change with the number of workers" in name_here("per_device_train_batch_size")
    assert "unless data.overlong is truncate" in name_here("cutoff_len")


def test_a_setting_that_belongs_into_a_section_is_told_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    top = "phases: {sft: {data: {train: rows.jsonl}, model: {path: org/m}}}\n"
    assert [errors(top, f"{key}=1")[0] for key in ("stage", "max_length", "rollout_batch")] == [
        "command line: stage: unknown key; did you mean sharding.stage?",
        "command line: max_length: unknown key; did you mean phases.NAME.data.max_length?",
        "command line: rollout_batch: this key belongs in a phase: phases.NAME.rollout_batch",
    ]
