"""The cache folder of this machine, for data that can be recreated: tokenized data, copies of objects in buckets."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """MUSTER_CACHE, or ~/.cache/muster."""
    return Path(os.environ.get("MUSTER_CACHE") or Path.home() / ".cache" / "muster")
