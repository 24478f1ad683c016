"""The records of clusters that this machine started: ~/.muster/clusters/NAME with cluster.json and token, both private
to their owner."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import Refused

_RECORD, _TOKEN = "cluster.json", "token"


def muster_home() -> Path:
    """MUSTER_HOME, or ~/.muster."""
    return Path(os.environ.get("MUSTER_HOME") or Path.home() / ".muster")


def clusters_folder() -> Path:
    return muster_home() / "clusters"


@dataclass(frozen=True)
class ClusterRecord:
    """The folder of one cluster."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def token_file(self) -> Path:
        return self.folder / _TOKEN

    def token(self) -> str:
        return self.token_file.read_text().strip()

    def record(self) -> dict[str, Any]:
        """What `up` has written down: the cluster file's settings as `spec`,
        and what the provider needs to find it again."""
        record: dict[str, Any] = json.loads((self.folder / _RECORD).read_text())
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record atomically."""
        draft = self.folder / f".{_RECORD}"
        draft.write_text(json.dumps(record, indent=1))
        os.replace(draft, self.folder / _RECORD)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def claim(name: str, record: Mapping[str, Any]) -> ClusterRecord:
    """A folder for a new cluster, with a token of its own. Raises Refused if there is a cluster of this name."""
    home = ClusterRecord(clusters_folder() / name)
    home.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        home.folder.mkdir(mode=0o700)
    except FileExistsError:
        raise Refused(
            f"the cluster {name} exists already; end it with `muster cluster down {name}`, or choose a different `name`"
        ) from None
    home.write(record)
    descriptor = os.open(home.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return home


def find(name: str) -> ClusterRecord | None:
    home = ClusterRecord(clusters_folder() / name)
    return home if (home.folder / _RECORD).exists() else None


def known() -> list[ClusterRecord]:
    """Return all clusters that this machine started, by name."""
    folders = sorted(clusters_folder().glob(f"*/{_RECORD}"))
    return [ClusterRecord(path.parent) for path in folders]
