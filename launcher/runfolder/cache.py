"""Where things are kept on this machine that can be made again: tokenised data, copies of what is in buckets."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """MUSTER_CACHE, or ~/.cache/muster."""
    return Path(os.environ.get("MUSTER_CACHE") or Path.home() / ".cache" / "muster")
