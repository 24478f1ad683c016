"""What storage uses of fsspec that fsspec does not promise.

tests/training/io/test_fsspec_compat.py says what it relies on.
"""

from __future__ import annotations

from typing import Any


def path_in(filesystem: Any, address: str) -> str:
    """Return the path that a file system's methods take for an address: `s3://bucket/key` -> `bucket/key`.

    Private: `AbstractFileSystem._strip_protocol`. The public `fsspec.core.url_to_fs` would make the file system again.
    """
    return str(filesystem._strip_protocol(address))
