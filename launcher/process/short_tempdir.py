"""Temporary folders whose path is short enough for the Unix sockets in them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from training.errors import InputError
from training.io.owned_folders import PREFIX, temporary_folder

_SHORT = "/tmp"
SOCKET_PATH = 107
"""Bytes of the longest path of a Unix socket (sun_path in unix(7), less its end)."""


@contextmanager
def short_tempdir(longest: int) -> Iterator[str]:
    """For the length of the block a new folder in TMPDIR that is open to this user alone, in /tmp if its path would
    have more than `longest` bytes.

    Raises InputError that names TMPDIR if neither can be written.
    """
    with ExitStack() as stack:
        try:
            parent = tempfile.gettempdir()
            name = PREFIX + 8 * "x"  # as long as what mkdtemp makes of the prefix
            too_long = len(f"{parent}/{name}".encode()) > longest
            folder = stack.enter_context(temporary_folder(PREFIX, _SHORT if too_long else parent))
        except OSError as error:
            what = "set TMPDIR to a folder that can be written, with a short path such as /tmp"
            raise InputError.of(
                "TMPDIR", f"no temporary folder can be made ({error.strerror or error}); {what}"
            ) from error
        yield str(folder)
