"""Writes the lock files beside it: every package by its version and the hash of every file that the index has of it.

    .venv/bin/python .ci/lock.py [--upgrade]

`cpu.lock` and `cuda.lock` are what Muster needs to run, the second with CUDA's libraries, as torch of the index asks
for them on Linux; `cpu` is for the file of torch that this machine's pip takes. `dev.lock` is what tests and checks
need besides. `audit.lock` is an environment of its own: one of its packages makes `import jsonschema`, and with it Ray,
seconds slower. `site.lock` is that of the documentation site. Versions stay as they are unless they are to be upgraded.
pip resolves; the hashes come from the index's own listing (PEP 691), which mirrors have, too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urljoin

from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

HERE = Path(__file__).parent
RUNTIME, DEVELOPMENT = ".[s3]", ".[s3,dev]"
AUDIT = ("pip-audit", "cyclonedx-bom")
SITE = ("mkdocs<2", "mkdocs-material", "mermaidx")
"""mermaidx contains Mermaid's own file for browsers, byte for byte, so that diagrams need no CDN."""
BUILD = "setuptools"
"""Needed before anything is built from source; torch asks for it, too."""
_JSON = "application/vnd.pypi.simple.v1+json"

Pins = dict[str, tuple[str, str]]
"""By name: version, and sha256 of the file that pip would install here."""


def main() -> None:
    known = None if "--upgrade" in sys.argv[1:] else _versions_in_force()
    cpu, everything, audit, site = (resolved(what, known) for what in ([RUNTIME], [DEVELOPMENT], AUDIT, SITE))
    cuda = resolved([RUNTIME], known, index_alone=True)
    development = {name: pin for name, pin in everything.items() if name not in cpu or name == BUILD}
    for name, pins in (("cpu", cpu), ("cuda", cuda), ("dev", development), ("audit", audit), ("site", site)):
        (HERE / f"{name}.lock").write_text(written(name, pins))


def resolved(what: Sequence[str], known: str | None, *, index_alone: bool = False) -> Pins:
    """What pip would install. `known`: versions to keep to. `index_alone`: no other files than the index's own."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraints.write_text(known or "")
        environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
        quietly = [*(["--isolated"] if index_alone else []), "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run(
            [sys.executable, "-m", "pip", *quietly, "--report", report, "--constraint", constraints, *what],
            env=environment if index_alone else None,
            cwd=HERE.parent,
            check=True,
        )
        packages = json.loads(report.read_text())["install"]
    return {
        _normal(package["metadata"]["name"]): (
            package["metadata"]["version"],
            package["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for package in packages
        if "archive_info" in package["download_info"]  # Muster itself is a folder
    }


def written(name: str, pins: Pins) -> str:
    """The text of a lock file."""
    with ThreadPoolExecutor(8) as pool:
        listed = dict(zip(pins, pool.map(lambda pin: _listed(pin[0], pin[1][0]), pins.items()), strict=True))
    lines = [f"# {name}.lock: written by .ci/lock.py, for `pip install --require-hashes -r`."]
    if unlisted := [package for package in sorted(pins) if not listed[package]]:
        lines.append(
            f"# The index lists no files of {', '.join(unlisted)}: the hash is that of the file found elsewhere."
        )
    for package in sorted(pins):
        version, chosen = pins[package]
        public = version.partition("+")[0]
        if version == public:
            lines += _block(f"{package}=={version}", {chosen, *listed[package]})
        else:  # a file from elsewhere, which pip would pass over for those whose hashes the index tells it
            lines += _block(f"{package}=={version} ; sys_platform == 'linux'", {chosen})
            lines += _block(f"{package}=={public} ; sys_platform != 'linux'", listed[package])
    return "\n".join(lines) + "\n"


def _block(requirement: str, hashes: set[str]) -> list[str]:
    return [" \\\n    ".join([requirement, *(f"--hash=sha256:{digest}" for digest in sorted(hashes))])]


def _listed(name: str, version: str) -> set[str]:
    """Hashes of the files that the index has of a version."""
    request = urllib.request.Request(urljoin(_index(), f"{name}/"), headers={"Accept": _JSON})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    wanted = Version(version.partition("+")[0])
    return {file["hashes"]["sha256"] for file in files if _version_of(file["filename"]) == wanted}


def _index() -> str:
    """Address of the index that pip asks first, with a slash at its end."""
    from pip._internal.models.index import PyPI

    return os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/") + "/"


def _version_of(filename: str) -> Version | None:
    try:
        if filename.endswith(".whl"):
            return parse_wheel_filename(unquote(filename))[1]
        return parse_sdist_filename(unquote(filename))[1]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _versions_in_force() -> str:
    text = "\n".join(path.read_text() for path in sorted(HERE.glob("*.lock")))
    return "\n".join(sorted(set(re.findall(r"^[a-z0-9-]+==[^\s+]+", text, re.MULTILINE))))


if __name__ == "__main__":
    main()
