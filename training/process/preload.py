"""What a worker imports before it knows its job: the seconds that starting one costs.
`run()` starts no thread and no device."""

from __future__ import annotations

import os
from importlib import import_module

MODULES = (
    "deepspeed",
    "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama",
    "training.roles.language",
    "training.process.rendezvous_server",
    "training.process.rendezvous_store",
)


def run(device: str) -> None:
    """Import it all, for workers on `device` (cpu, cuda)."""
    os.environ["DS_ACCELERATOR"] = device
    # Asking the driver for GPUs would open them in this process, and none that is forked from it could.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # DeepSpeed imports torch's inductor, 1.4 s, for an optimizer that is not used here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for module in MODULES:
        import_module(module)
