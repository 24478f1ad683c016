"""The accelerator that workers compute on, and all that is asked of torch about it. Loads torch late.

The only file that names CUDA to torch (tests/test_imports.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import torch
    from torch.profiler import ProfilerActivity

DeviceType = Literal["cpu", "cuda"]
"""A torch device type, as in `RankInfo.device`, `torch.autocast` and DeepSpeed's DS_ACCELERATOR."""
ACCELERATOR: Final = "cuda"
_DRIVER = Path("/proc/driver/nvidia")


def device_type(accelerated: bool) -> DeviceType:
    """The type of the device of workers with an accelerator, or without."""
    return ACCELERATOR if accelerated else "cpu"


def is_accelerator(device: str) -> bool:
    """Whether a device type is that of the accelerator."""
    return device == ACCELERATOR


def num_gpus() -> int:
    """Accelerators that this process may use, without loading torch or a CUDA library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    return len(list((_DRIVER / "gpus").glob("*")))


def is_available() -> bool:
    """Whether torch finds an accelerator. May open the driver: not before a fork."""
    return bool(_module().is_available())


def torch_device(device: str, index: int) -> torch.device:
    """torch's device of a worker; `index` is ignored on a CPU."""
    import torch

    return torch.device(device, index) if is_accelerator(device) else torch.device("cpu")


def collective_backend(device: str) -> str:
    """The backend of torch.distributed for tensors on a device."""
    return "nccl" if is_accelerator(device) else "gloo"


def set_device(index: int) -> None:
    """Make an accelerator this process's default one. Call before the process group is made."""
    _module().set_device(index)


def multiplies_bf16() -> bool:
    """Whether the accelerator's matrix units take bf16 (compute capability 8.0 and newer); emulation does not count."""
    return bool(_module().is_bf16_supported(including_emulation=False))


def device_name(device: torch.device) -> str:
    """The product name that the driver reports, or `cpu`."""
    return str(_module().get_device_name(device)) if is_accelerator(device.type) else "cpu"


def total_bytes(device: torch.device) -> int:
    """Memory of an accelerator."""
    return int(_module().get_device_properties(device).total_memory)


def free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total memory of an accelerator, all processes counted; zeros on a CPU."""
    free, total = _module().mem_get_info(device) if is_accelerator(device.type) else (0, 0)
    return free, total


def peak_allocated_bytes() -> int:
    """The most memory that tensors of this process have taken on its accelerator."""
    return int(_module().max_memory_allocated())


def peak_reserved_bytes() -> int:
    """The most memory that torch's allocator has taken from the accelerator in this process, cached blocks included."""
    return int(_module().max_memory_reserved())


def synchronize(device: torch.device | str) -> None:
    """Wait for all work queued on a device (its type: on the default one); nothing to wait for on a CPU."""
    kind = device if isinstance(device, str) else device.type
    if is_accelerator(kind):
        _module().synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give memory that torch's allocator keeps for later back to the accelerator; nothing on a CPU."""
    if is_accelerator(device.type):
        _module().empty_cache()


def timing_event() -> Any:
    """A mark in the accelerator's queue: `record()`, later `elapsed_time(other)` in milliseconds."""
    return _module().Event(enable_timing=True)


def profiler_activities(device: str) -> list[ProfilerActivity]:
    """What torch's profiler records of a worker on a device."""
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_accelerator(device) else [])]


def library_versions() -> dict[str, str]:
    """Versions of the accelerator's libraries and driver, which all workers must share."""
    import torch

    nccl = ".".join(map(str, _module().nccl.version()))
    return {"CUDA": str(torch.version.cuda), "NCCL": nccl, "driver": _driver_version()}


def _driver_version() -> str:
    try:
        return (_DRIVER / "version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return "unknown"


def _module() -> Any:
    """torch's module for the accelerator."""
    import torch

    return torch.cuda
