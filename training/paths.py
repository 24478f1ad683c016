"""A path as a user wrote it, as absolute text that names the same file for the operating system."""

from __future__ import annotations

import os
from pathlib import Path


def absolute(path: str | Path, base: Path | None = None) -> str:
    """`path` from the folder `base` (None: the current one), with `~` expanded and `.` and `..` taken out.

    `link/..` is the folder around what the link points to, as for open(); os.path.abspath would take the folder around the link.
    Links that no `..` follows stay as they are: the text is part of a job's hash.
    """
    parts = Path(os.getcwd(), base or "", os.path.expanduser(path)).parts
    result = parts[0]
    for part in parts[1:]:
        if part == os.pardir:
            result = os.path.dirname(os.path.realpath(result) if os.path.islink(result) else result)
        else:
            result = os.path.join(result, part)
    return result
