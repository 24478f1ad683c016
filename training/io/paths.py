"""Paths as users write them, and names of files as others hand them over."""

from __future__ import annotations

import os
from pathlib import Path

_LONGEST_NAME = 255
"""Bytes."""


def is_below(name: str) -> bool:
    """Whether a name that comes from a bucket, a manifest or an index stays below the folder that it is joined to."""
    parts = name.split("/")
    return not {"\\", "\0"} & set(name) and all(part not in ("", ".", "..") and _is_name(part) for part in parts)


def _is_name(part: str) -> bool:
    """Whether a file system can have a file of this name."""
    try:
        return len(part.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False


def absolute(path: str | Path, base: Path | None = None) -> str:
    """`path`, as a user wrote it, from the folder `base` (None: the current one),
    with `~` expanded and `.` and `..` taken out.

    It names the same file for the operating system: `link/..` is the folder around what the link points to, as for
    open(); os.path.abspath would take the folder around the link. Links that no `..` follows stay as they are: the text
    is part of a job's hash.
    """
    parts = Path(os.getcwd(), base or "", os.path.expanduser(path)).parts
    result = parts[0]
    for part in parts[1:]:
        if part == os.pardir:
            result = os.path.dirname(os.path.realpath(result) if os.path.islink(result) else result)
        else:
            result = os.path.join(result, part)
    return result
