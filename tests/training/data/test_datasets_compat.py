"""What data preparation relies on in the library `datasets` without a promise, in the version that is installed."""

from __future__ import annotations

from training.data.datasets_compat import fingerprint


def test_the_fingerprint_is_that_of_the_rows():
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["a", "b"]})
    assert fingerprint(rows) == fingerprint(Dataset.from_dict({"text": ["a", "b"]}))
    assert fingerprint(rows) != fingerprint(Dataset.from_dict({"text": ["a", "c"]}))
