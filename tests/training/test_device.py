"""The accelerator, as far as a machine without one can tell."""

from __future__ import annotations

import pytest
import torch

from training import device


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-1a, GPU-2b", 2)])
def test_visible_gpus_are_counted_without_a_cuda_library(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.num_gpus() == count


def test_a_worker_on_a_cpu_has_no_device_index():
    assert device.torch_device("cpu", 3) == torch.device("cpu")
    assert device.torch_device("cuda", 3) == torch.device("cuda", 3)


def test_on_a_cpu_there_is_nothing_to_wait_for_or_to_free():
    cpu = torch.device("cpu")
    device.synchronize(cpu)
    device.empty_cache(cpu)
    assert (device.device_name(cpu), device.free_and_total_bytes(cpu)) == ("cpu", (0, 0))
