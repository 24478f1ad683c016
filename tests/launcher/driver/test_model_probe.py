"""Models are examined before a job runs: by a process of its own, with their own code if that is asked for,
and on the hub where it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.driver import model_probe
from launcher.jobfile import job as jobs
from launcher.workers.supervisor import AT_HAND
from tests.support.hub_server import Repository, files_of, hub_server, run_commands

pytestmark = pytest.mark.cpu

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, position_ids=None, **more):
        return super().forward(input_ids=input_ids, POSITIONS, **more)
"""


def traits_files(cache: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in cache.glob("models/traits-*.json")}


@pytest.fixture
def cache(place, monkeypatch) -> Path:
    monkeypatch.setenv("MUSTER_CACHE", str(place / "cache"))
    monkeypatch.setattr("training.estimate.model_traits._known", {})
    monkeypatch.delenv(
        AT_HAND, raising=False
    )  # of a Ray that other tests share: its processes have another environment
    return place / "cache"


def test_a_model_that_ends_the_process_goes_the_slow_way(place, cache):
    own_code(place, "os._exit(7)", before="import os\n")
    known = model_probe.examined(jobs.load(Path("job.yaml"), ["model.trust_remote_code=true"]).phases["sft"])
    assert known.unknown == "the process that examined it ended with status 7: no message"
    assert not known.packs("eager")


def own_code(place: Path, positions: str, before: str = "") -> None:
    """Makes the model one of a class that its folder brings along."""
    settings = json.loads((place / "model" / "config.json").read_text())
    own = {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (place / "model" / "config.json").write_text(json.dumps(settings | own))
    code = before + CODE.replace("POSITIONS", f"position_ids={positions}")
    (place / "model" / "modeling_own.py").write_text(code)


def test_the_code_of_a_model_is_examined_if_it_is_trusted(place, cache, muster):
    own_code(place, "None")
    refused = muster("check", "job.yaml")
    assert refused.status == 2
    assert "the model needs Python code that comes with it (`auto_map`)" in refused.err
    assert not traits_files(cache), "untrusted code is not run"
    answer = muster("check", "job.yaml", "model.trust_remote_code=true")
    assert answer.status == 0, answer
    assert "sft: samples of OwnForCausalLM that share a row see each other" in answer.out
    phase = jobs.load(Path("job.yaml"), ["model.trust_remote_code=true"]).phases["sft"]
    files = traits_files(cache)
    assert len(files) == 1
    assert not model_probe.examined(phase).packs("sdpa")
    assert traits_files(cache) == files, "once is enough"
    own_code(place, "position_ids")
    assert model_probe.examined(phase).packs("sdpa"), "other code is another model"


HUB_JOB = """\
name: hub
model: {path: org/opt, dtype: fp32, lora: {rank: 4, alpha: 8}}
resources: {workers: 1, gpus_per_worker: 0}
sharding: {stage: 0}
phases:
  sft:
    data: {train: data/train.jsonl, template: none, max_length: 32}
    max_steps: 2
    batch: 4
    learning_rate: 1.0e-2
    checkpoint: {every: 2}
"""


def opt(place: Path) -> None:
    """A folder `opt` with a model whose packed samples see each other, and the tokenizer of the tests."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=260, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(place / "opt")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "model" / file, place / "opt")


def test_a_model_of_the_hub_is_examined_trained_with_adapters_asked_and_merged(place, cache):
    opt(place)
    (place / "hub.yaml").write_text(HUB_JOB)
    sees = "samples of OPTForCausalLM that share a row see each other"
    ask = ["generate", "runs/hub", "-p", "1 + 1 =", "--max-new-tokens", "4", "--plain"]
    away = {"HF_HUB_OFFLINE": "1"}
    (checked,) = run_commands(place, away, ["check", "hub.yaml"])
    assert (
        "org/opt is no folder here, so it is a model of the hub or of a bucket; what its code can do is examined when "
        "the job runs" in checked
    )
    with hub_server() as hub:
        hub.repositories["models org/opt"] = Repository()
        hub.repositories["models org/opt"].commit(files_of(place / "opt"))
        there = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        checked, trained, asked, _ = run_commands(
            place, there, ["check", "hub.yaml"], ["run", "hub.yaml", "--inline"], ask, ["export", "runs/hub", "--merge"]
        )
    assert sees in checked
    assert sees in trained
    saved = json.loads((place / "runs/hub/sft/model/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "org/opt"
    checked, again, merged = run_commands(
        place, away, ["check", "hub.yaml"], ask, ["generate", "runs/hub/sft/model-2-merged", *ask[2:]]
    )
    assert sees in checked, "the cache of the hub's library is enough"
    assert again == asked
    assert merged.split("response:")[1] == asked.split("response:")[1]
