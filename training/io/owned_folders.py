"""Folders that go with the process that made them: removed by it in order,
else by the next process that makes one in the same place.

Each holds a file that its process has locked. The kernel takes the lock away
when the process is gone, however it ended.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWNER = ".owner"
"""Name of the locked file."""
PREFIX = "muster-"
"""Names of temporary folders begin with it."""


def own(folder: Path) -> int:
    """Make this process the owner of a folder. Returns the descriptor
    that holds the lock: closing it gives the folder up."""
    draft = folder / f"{OWNER}.new"  # under its own name it is locked from the first moment on
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # a file system without locks: nobody will find that the owner is gone
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    draft.rename(folder / OWNER)
    return descriptor


def sweep(parent: Path, pattern: str) -> None:
    """Remove the folders of this user in `parent` whose owner is gone.
    Others, and those without an owner's file, are left alone."""
    for folder in parent.glob(pattern):
        with suppress(OSError):
            if not folder.is_symlink() and folder.stat().st_uid == os.getuid() and _is_given_up(folder / OWNER):
                shutil.rmtree(folder, ignore_errors=True)


def _is_given_up(owner: Path) -> bool:
    descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def temporary_folder(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """A new folder in TMPDIR, or in `parent`, for the length of the block.
    Also removes those there whose owners are gone."""
    parent = parent or tempfile.gettempdir()
    sweep(Path(parent), f"{prefix.partition('-')[0]}-*")
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    descriptor = own(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """The last processes that used it may still be writing a log as they end."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
