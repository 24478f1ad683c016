"""Whether all workers of a group have the same values, compared through tensors of a fixed size.

`torch.distributed.all_gather_object` would unpickle what comes from the network, and unpickling runs code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

_DIGEST_BYTES = 32
_SHOWN_BYTES = 224
"""Of each value, for messages."""


def differences(values: Mapping[str, str], device: torch.device) -> list[str]:
    """The values that not all workers share, one text a value: which workers differ from worker 0, and what both have.

    A collective: all workers call it with the same names, and all get the same answer. Empty if they agree.
    """
    mine = torch.stack([_row(value) for value in values.values()]).to(device)  # [values, bytes]
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    everyone = torch.stack(gathered, dim=1).cpu()  # [values, workers, bytes]
    return [text for name, rows in zip(values, everyone, strict=True) if (text := _difference(name, rows))]


def _row(value: str) -> Tensor:
    """Digest of the whole value, and its beginning. [bytes]"""
    data = value.encode()
    row = hashlib.sha256(data).digest() + data[:_SHOWN_BYTES].ljust(_SHOWN_BYTES, b"\0")
    return torch.frombuffer(bytearray(row), dtype=torch.uint8)


def _difference(name: str, rows: Tensor) -> str:
    """Of one value. rows: [workers, bytes]"""
    odd = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if not odd:
        return ""
    return (
        f"{name} of worker{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}: {_shown(rows[odd[0]])}, of worker 0: "
        f"{_shown(rows[0])}"
    )


def _shown(row: Tensor) -> str:
    return bytes(row[_DIGEST_BYTES:].tolist()).rstrip(b"\0").decode(errors="replace") or "none"
