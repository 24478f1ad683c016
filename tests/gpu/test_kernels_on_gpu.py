"""On one GPU: Liger's kernels, and compiled layers, give the curve that torch's kernels give.
Each in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training_fixtures import Recorder, phase_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]

FP32, BF16 = 1e-4, 2 * 2**-8
"""Relative difference of a loss. fp32: other kernels, other order of sums. bf16: 8 bits, rounded at other places."""


def _run(tiny: Path, folder: Path, settings: dict) -> tuple[list[float], str]:
    from training.drivers import supervised
    from training.group import InlineGroup, Worker
    from training.process.distributed import RankInfo, join, set_environment

    rank_info = RankInfo(rank=0, size=1, device="cuda")
    set_environment(rank_info)
    join(rank_info)
    worker = Worker(rank_info)
    phase = phase_of(tiny, "sft", **settings)
    worker.build("trainer", "training.roles.language:LanguageTrainer", phase, str(tiny / "cache"))
    hooks = Recorder(folder)
    supervised.run(phase, {"trainer": InlineGroup(worker, "trainer")}, hooks)
    return hooks.losses, hooks.info.kernels


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("how", "stage", "lora"),
    [
        ({"kernels": "liger"}, 0, None),
        ({"kernels": "liger"}, 2, {"rank": 4}),
        ({"kernels": "liger", "gradient_checkpointing": True}, 3, None),
        ({"compile": True}, 2, None),
        ({"compile": True, "gradient_checkpointing": True}, 2, {"rank": 4}),
    ],
)
def test_the_curve_is_that_of_torchs_kernels(tiny, tmp_path, how, stage, lora, dtype):
    if "kernels" in how and find_spec("liger_kernel") is None:
        pytest.skip("the package liger-kernel is not installed")

    def run(name, **more):
        model = {"path": str(tiny / "model"), "dtype": dtype, "lora": lora, **more}
        # A fresh process: what Liger puts into transformers stays there.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            return fresh.submit(_run, tiny, tmp_path / name, {"stage": stage, "model": model}).result(timeout=300)

    (losses, kernels), (expected, _) = run("fused", **how), run("plain", kernels="torch")
    assert kernels == how.get("kernels", "torch")
    difference = np.abs(np.array(losses) / np.array(expected) - 1).max()
    assert difference < (FP32 if dtype == "fp32" else BF16)
