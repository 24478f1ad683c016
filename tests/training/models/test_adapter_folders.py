"""Adapters of other makes: what their folders say must be what their tensors are. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from training.errors import InputError
from training.model_folder import adapter_in

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    tensors = {f"{LAYER}.lora_A.weight": np.zeros((4, 8)), f"{LAYER}.lora_B.weight": np.zeros((8, 4))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    configure(tmp_path)
    return tmp_path


def configure(folder: Path, **changes) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        adapter_in(str(folder))
    return str(caught.value)


def test_a_rank_that_is_not_that_of_the_tensors_is_refused(folder):
    configure(folder, r=8)
    assert "adapter_config.json: says r 8, but its tensors have rank 4; copy the adapter again" in refusal(folder)


def test_numbers_that_are_written_as_text_are_numbers(folder):
    configure(folder, r="4", lora_alpha="8")
    adapter = adapter_in(str(folder))
    assert (adapter.rank, adapter.alpha) == (4, 8.0)
    configure(folder, r="four")
    assert "not a readable adapter of LoRA" in refusal(folder)


def test_an_adapter_that_does_not_say_its_model_is_refused(folder):
    configure(folder, base_model_name_or_path=None)
    assert "does not say which model it was trained on; set base_model_name_or_path to its folder" in refusal(folder)


def test_the_folder_of_the_model_below_is_absolute(folder, tmp_path_factory, monkeypatch):
    work = tmp_path_factory.mktemp("work")
    (work / "base").mkdir()
    monkeypatch.chdir(work)
    assert adapter_in(str(folder)).base == str(work / "base")
    (work / "base").rmdir()
    assert adapter_in(str(folder)).base == "base", "a name on the hub, as far as is known"


def test_pickled_adapters_are_refused_with_a_way_out(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert (
        "has its weights in adapter_model.bin, a pickle, which can run code when it is loaded; convert it"
        in refusal(folder)
    )


def test_the_way_out_of_an_adapter_that_peft_cannot_merge_is_not_to_merge_it(folder):
    configure(folder, peft_type="PREFIX_TUNING")
    assert "it can be neither loaded here nor merged by PEFT; use a LoRA adapter" in refusal(folder)
    configure(folder, peft_type="IA3")
    assert "merge_and_unload()" in refusal(folder)
