"""On one GPU, in this process: the same job as on a CPU gives the same curve, at every ZeRO stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training_fixtures import Recorder, sft_phase

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]


@pytest.fixture(scope="module")
def worker():
    """The one worker of this process; its process group lasts for the module."""
    from training.distributed import Seat, join, leave, set_environment
    from training.group import Worker

    seat = Seat(rank=0, size=1, device="cuda")
    set_environment(seat)
    join(seat)
    yield Worker(seat)
    leave()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_curve_on_a_gpu_is_that_on_a_cpu(worker, train, tiny, tmp_path, stage, dtype):
    from training.group import InlineGroup
    from training.recipes import supervised

    expected = np.array(train(1).losses)
    phase = sft_phase(tiny, stage=stage, dtype=dtype)
    worker.build("trainer", "training.recipes.language:LanguageTrainer", phase, str(tiny / "cache"))
    hooks = Recorder(tmp_path)
    supervised.run(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks)
    difference = np.abs(np.array(hooks.losses) / expected - 1).max()
    # fp32: other kernels, other order of sums. bf16: 8 bits, as on the CPU.
    assert difference < (1e-4 if dtype == "fp32" else 2 * 2**-8)


@pytest.mark.parametrize("stage", [2, 3])
def test_answers_on_a_gpu_are_those_on_a_cpu(worker, train, tiny, tmp_path, stage):
    """Under ZeRO-3 from a gathered copy, whose parameters are nowhere until it is filled."""
    from training.group import InlineGroup
    from training.recipes import supervised

    questions = {"data": str(tiny / "eval.jsonl"), "limit": 12, "max_new_tokens": 12}
    expected = train(1, eval=questions, eval_every=4)
    phase = sft_phase(tiny, stage=stage, eval=questions, eval_every=4)
    worker.build("trainer", "training.recipes.language:LanguageTrainer", phase, str(tiny / "cache"))
    hooks = Recorder(tmp_path)
    supervised.run(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks)
    responses = [
        {at: [row["response"] for row in rows] for at, rows in run.answered.items()} for run in (hooks, expected)
    ]
    assert responses[0] == responses[1]
