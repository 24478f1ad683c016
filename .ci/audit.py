"""Asks an index for known vulnerabilities of every pinned package. Exit status 1 if there are any;
says what it has no answer for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> int:
    packages = [
        package for name in ("cpu", "cuda", "dev", "audit", "site") for package in answers(HERE / f"{name}.lock")
    ]
    found, without = vulnerable(packages), unanswered(packages)
    asked = {package["name"] for package in packages}
    for line in found:
        print(line)
    if without or not asked:
        print(f"audit: the index has no answer for {len(without)} of {len(asked)} packages")
    if asked > without and not found:
        print(f"audit: no known vulnerabilities in {len(asked - without)} packages")
    return 1 if found else 0


def answers(lock: Path) -> list[dict[str, Any]]:
    """What pip-audit says of every package of a lock file; nothing if its index cannot be reached."""
    command = [
        "-m",
        "pip_audit",
        "--format",
        "json",
        "--progress-spinner",
        "off",
        "--disable-pip",
        "--no-deps",
        "-r",
        lock,
    ]
    ended = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if not ended.stdout:
        print(f"audit: {lock.name}: {(ended.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return []
    return json.loads(ended.stdout)["dependencies"]


def vulnerable(packages: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every known vulnerability."""
    return sorted(
        {
            (
                f"{package['name']} {package['version']}: {known['id']}, mended in "
                f"{', '.join(known['fix_versions']) or 'no version'}"
            )
            for package in packages
            for known in package.get("vulns", [])
        }
    )


def unanswered(packages: Sequence[Mapping[str, Any]]) -> set[str]:
    """Packages that the index does not know."""
    return {package["name"] for package in packages if "skip_reason" in package}


if __name__ == "__main__":
    sys.exit(main())
