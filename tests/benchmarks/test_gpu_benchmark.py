"""The benchmark of a GPU, as far as it goes without one: its jobs are valid, its samples full,
its operations counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import gpu, workload
from benchmarks.options import Options, Skipped
from launcher.jobfile import job as jobs

TINY = gpu.Case(workload.Shape(16, 32, 2, 2, 5000), 64, {"rank": 4, "alpha": 8})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return gpu.make(tmp_path_factory.mktemp("gpu") / "work", TINY, device="cpu", dtype="float32")


@pytest.mark.parametrize("lora", [TINY.lora, None], ids=["adapters", "all weights"])
@pytest.mark.parametrize("choice", [{}, *gpu.CHOICES.values()], ids=["auto", *gpu.CHOICES])
def test_every_choice_is_a_valid_job(work, tmp_path, choice, lora):
    settings = gpu.job(work, replace(TINY, lora=lora), Options(), choice, on_gpu=True)
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    phase = jobs.load(tmp_path / "job.yaml").phases["sft"]
    laid = {key: value for section in choice.values() for key, value in section.items()}
    found = {**phase.model_dump(), **phase.model.model_dump(), **phase.data.model_dump()}
    assert {key: found[key] for key in laid} == laid


@pytest.mark.cpu
@pytest.mark.long
def test_samples_are_full_and_steps_are_measured(work):
    figures = gpu.train(work, TINY, Options(steps=2), None, {})
    assert figures["tokens_per_s"]["min"] > 0
    assert figures["mfu"] is None
    (metrics,) = work.model.parent.glob("run-*/runs/bench/sft/metrics.jsonl")
    tokens = [json.loads(line)["tokens"] for line in metrics.read_text().splitlines()]
    assert tokens == [gpu.BATCH * TINY.tokens] * (gpu.WARM_UP + 2)


def test_operations_are_those_of_the_convention(tmp_path):
    shape = gpu.SEVEN_B
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    parameters = 6_738_415_616  # LLaMA-2 7B
    attention = 6 * 32 * 4096 * 2048  # forward 4 L d T, backward twice that, causal: half
    full = replace(gpu.CASES["7b-lora-2048"], lora=None)
    assert gpu.flops_a_token(tmp_path, full) == pytest.approx(6 * parameters + attention, rel=1e-3)
    assert gpu.flops_a_token(tmp_path, gpu.CASES["7b-lora-2048"]) == pytest.approx(4 * parameters + attention, rel=1e-3)


def test_the_peak_is_that_of_the_data_sheet():
    assert gpu.peak("NVIDIA H100 80GB HBM3") == 989e12


def test_without_a_gpu_it_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gpu.gpu_name", lambda: None)
    with pytest.raises(Skipped, match="no GPU"):
        gpu.measure(Options(), tmp_path)
