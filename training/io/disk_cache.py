"""Results of slow checks, kept as JSON files in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

VERSION = 1
"""Raise it when a check gives other results for the same inputs."""


def load_or_compute(cache: Path, kind: str, key: Any, compute: Callable[[], Any]) -> Any:
    """The result of `compute`, read from a file in the cache if it was computed before.
    `key` and the result must be JSON.

    `kind` names the folder in the cache. A cache that cannot be written is left as it is.
    """
    digest = hashlib.sha256(json.dumps([VERSION, key], sort_keys=True).encode()).hexdigest()
    file = cache / kind / f"{digest[:32]}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = compute()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}-{os.getpid()}")
        draft.write_text(json.dumps(result), encoding="utf-8")
        draft.replace(file)
    return result
