"""A run of somebody else runs no Python code here without --trust-remote-code, whatever its job.yaml allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open(PROOF, "a").write("x")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
QUESTIONS = "questions.jsonl"


@pytest.fixture
def foreign(place, muster, monkeypatch) -> Path:
    """A run of a model with code of its own, after one checkpoint; returns the file
    that the code leaves behind from now on."""
    monkeypatch.setenv("MUSTER_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(place / "modules"))
    monkeypatch.setattr("training.estimate.model_traits._known", {})
    own_code(place, place / "while-training")
    done = muster("run", "job.yaml", "--inline", "model.trust_remote_code=true", "phases.sft.max_steps=2")
    assert done.status == 0, done.out + done.err
    (place / QUESTIONS).write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n")
    own_code(place, place / "was-run")
    return place / "was-run"


def own_code(place: Path, proof: Path) -> None:
    settings = json.loads((place / "model" / "config.json").read_text())
    own = {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }  # fmt: skip
    (place / "model" / "config.json").write_text(json.dumps(settings | own))
    (place / "model" / "modeling_own.py").write_text(CODE.replace("PROOF", repr(str(proof))))


def verbs(checkpoint: Path) -> dict[str, list[str]]:
    generate = ["generate", str(checkpoint), "--prompt", "1 + 1 =", "--max-new-tokens", "2"]
    evaluate = ["eval", str(checkpoint), "--data", QUESTIONS, "--max-new-tokens", "2"]
    critique = [
        "critique",
        "out.jsonl",
        "--data",
        QUESTIONS,
        "--teacher",
        str(checkpoint),
        "--column",
        "answer",
        "--max-new-tokens",
        "2",
    ]
    return {
        "export": ["export", "runs/sums", "--out", "exported"],
        "generate": generate,
        "eval": evaluate,
        "critique": critique,
    }


def test_code_of_a_foreign_run_needs_consent_and_runs_with_it(foreign, place, muster):
    checkpoint = place / "runs/sums/sft/checkpoints/step-00000002"
    for command in verbs(checkpoint).values():
        refused = muster(*command)
        assert refused.status == 2, command
        assert "brings Python code of its own (`auto_map`)" in refused.err
        assert "--trust-remote-code" in refused.err
        assert not foreign.exists(), f"{command[0]} ran it"
    for command in verbs(checkpoint).values():
        answer = muster(*command, "--trust-remote-code")
        assert answer.status == 0, (command, answer.out + answer.err)
    assert foreign.exists()


def test_a_model_folder_with_code_is_loaded_with_consent_alone(foreign, place, muster):
    command = ["generate", "model", "--prompt", "1 + 1 =", "--max-new-tokens", "2"]
    refused = muster(*command)
    assert refused.status == 2
    assert "--trust-remote-code" in refused.err
    assert not foreign.exists()
    assert muster(*command, "--trust-remote-code").status == 0
    assert foreign.exists()


def test_a_job_that_allows_code_which_the_model_does_not_have_needs_no_consent(place, muster, monkeypatch):
    monkeypatch.setenv("MUSTER_CACHE", str(place / "cache"))
    done = muster("run", "job.yaml", "--inline", "model.trust_remote_code=true", "phases.sft.max_steps=2")
    assert done.status == 0, done.out + done.err
    assert muster("export", "runs/sums", "--out", "exported").status == 0
