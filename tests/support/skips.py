"""With CI=true a skipped test is a failure, unless its reason is one that a machine of CI may have."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

MAY_LACK = (
    "this machine has no GPU",
    "huge pages are not for who asks",
    "the tests run with settings of glibc's",
    "cannot limit the memory of a process",
)
"""Beginnings of reasons: hardware and settings of the kernel. A missing tool is not among them:
.ci/run installs tools."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not reason.startswith(MAY_LACK):
            report.outcome, report.longrepr = "failed", f"With CI=true this test must not be skipped: {reason}"
    return report
