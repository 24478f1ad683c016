"""What storage relies on in fsspec without a promise, in the version that is installed."""

from __future__ import annotations

import fsspec
import pytest

from training.io.fsspec_compat import path_in


@pytest.mark.parametrize(
    ("address", "path"),
    [("s3://bucket/a/key", "bucket/a/key"), ("memory://a/key", "/a/key"), ("s3://bucket", "bucket")],
)
def test_the_path_of_an_address_is_that_of_fsspecs_own_function(address, path):
    assert path_in(fsspec.get_filesystem_class(address.partition(":")[0]), address) == path
    filesystem, its_path = fsspec.core.url_to_fs(address)
    assert path_in(filesystem, address) == its_path == path
