"""The features of this machine's processor. Free of torch."""

from __future__ import annotations


def cpu_multiplies_bf16() -> bool:
    """Whether it has instructions for it; without them bf16 is slower than fp32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
