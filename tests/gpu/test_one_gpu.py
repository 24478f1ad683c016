"""On one GPU, in this process: the same job as on a CPU gives the same curve, at every ZeRO stage."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest
import torch

from tests.support.training_fixtures import Recorder, phase_of, sft_phase

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]


@pytest.fixture(scope="module")
def worker():
    """The one worker of this process; its process group lasts for the module."""
    from training.group import Worker
    from training.process.distributed import RankInfo, join, leave, set_environment

    rank_info = RankInfo(rank=0, size=1, device="cuda")
    set_environment(rank_info)
    join(rank_info)
    yield Worker(rank_info)
    leave()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_curve_on_a_gpu_is_that_on_a_cpu(worker, train, tiny, tmp_path, stage, dtype):
    from training.drivers import supervised
    from training.group import InlineGroup

    expected = np.array(train(1).losses)
    phase = sft_phase(tiny, stage=stage, dtype=dtype)
    worker.build("trainer", "training.roles.language:LanguageTrainer", phase, str(tiny / "cache"))
    hooks = Recorder(tmp_path)
    supervised.run(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks)
    difference = np.abs(np.array(hooks.losses) / expected - 1).max()
    # fp32: other kernels, other order of sums. bf16: 8 bits, as on the CPU.
    assert difference < (1e-4 if dtype == "fp32" else 2 * 2**-8)


@pytest.mark.parametrize("stage", [2, 3])
def test_answers_on_a_gpu_are_those_on_a_cpu(worker, train, tiny, tmp_path, stage):
    """Under ZeRO-3 from a gathered copy, whose parameters are nowhere until it is filled."""
    from training.drivers import supervised
    from training.group import InlineGroup

    questions = {"data": str(tiny / "eval.jsonl"), "limit": 12, "max_new_tokens": 12}
    expected = train(1, eval=questions, eval_every=4)
    phase = sft_phase(tiny, stage=stage, eval=questions, eval_every=4)
    worker.build("trainer", "training.roles.language:LanguageTrainer", phase, str(tiny / "cache"))
    hooks = Recorder(tmp_path)
    supervised.run(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks)
    responses = [
        {at: [row["response"] for row in rows] for at, rows in run.answered.items()} for run in (hooks, expected)
    ]
    assert responses[0] == responses[1]


@pytest.mark.parametrize(("stage", "how"), [(0, "batched"), (0, "continuous"), (3, "batched"), (3, "continuous")])
def test_ppo_on_a_gpu_is_that_on_a_cpu(worker, train, tiny, tmp_path, stage, how):
    """In fp32: the same responses, so the same rewards; what is computed of them is equal to rounding."""
    from training.config import PPO_ROLES
    from training.drivers import ppo
    from training.group import InlineGroup
    from training.recipes import RECIPES

    settings = {
        "recipe": "ppo", "reward": "tests.support.some_rewards:nines", "critic": str(tiny / "model"),
        "rollout_batch": 16, "batch": 8,
        "response_tokens": 8, "max_steps": 2, "data": {"max_length": 64},
    }  # fmt: skip
    expected = train(1, **settings)
    phase = phase_of(tiny, stage=stage, generation=how, **settings)
    for role in PPO_ROLES:
        worker.build(role, RECIPES["ppo"].roles[role], phase, str(tiny / "cache"))
    hooks = Recorder(tmp_path)
    ppo.run(phase, {role: InlineGroup(worker, role) for role in PPO_ROLES}, hooks)
    names = ("reward", "kl", "policy_loss", "value_loss", "entropy")
    measured = [np.array([[row[name] for name in names] for row in run.rows]) for run in (hooks, expected)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("stage", "lora"), [(0, None), (1, None), (2, None), (3, None), (2, {"rank": 16})])
def test_the_memory_that_a_plan_tells(worker, tiny, tmp_path, stage, lora):
    """Against what CUDA had allocated at most, which neither knows CUDA's context nor what lies
    between blocks. 110 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.drivers import supervised
    from training.estimate.memory import Models, setting_of, team
    from training.estimate.parameters import shape_of
    from training.group import InlineGroup

    shutil.copytree(tiny, tmp_path / "work")
    folder = tmp_path / "work"
    config = LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    text = {"text": "one and one is two, and so it is. " * 200}
    (folder / "pretrain.train.jsonl").write_text((json.dumps(text) + "\n") * 8)
    data = {"max_length": 256, "pack": False}
    phase = phase_of(folder, "pretrain", stage=stage, dtype="bf16", lora=lora, data=data, micro_batch=4, max_steps=3)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    worker.build("trainer", "training.roles.language:LanguageTrainer", phase, str(folder / "cache"))
    supervised.run(phase, {"trainer": InlineGroup(worker, "trainer")}, Recorder(tmp_path / "checkpoints"))
    found = torch.cuda.max_memory_allocated() - before
    needs = team(
        phase, (), Models(shape_of(str(folder / "model"))), setting_of(phase, dtype="bf16", on_gpu=True, longest=256)
    )
    predicted = sum(size for what, size in needs.device.items() if what not in ("CUDA and NCCL", "fragmentation"))
    print(f"stage {stage} lora={bool(lora)}: predicted {predicted / 2**20:.0f} MiB, allocated {found / 2**20:.0f} MiB")
    assert found == pytest.approx(predicted, rel=0.1)
