"""What data preparation uses of the library `datasets` that it does not promise.

tests/training/data/test_datasets_compat.py says what it relies on.
"""

from __future__ import annotations

from typing import Any


def fingerprint(dataset: Any) -> str:
    """Return a text that changes when the rows of a data set of the hub may have changed.

    Private: `Dataset._fingerprint`, made from the revision and the files that the data set was loaded from.
    """
    return str(dataset._fingerprint)
