"""An existing Ray cluster: Muster uses it and never starts or ends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError, Refused
from cluster.providers import Finding, Say
from cluster.registry import ClusterRecord
from cluster.remote_shell import Login
from cluster.spec import Existing
from cluster.tunnel import tunnel


class ExistingProvider:
    def __init__(self, spec: Existing):
        self.spec = spec

    def render(self) -> str:
        return f"# nothing to apply: {self.spec.address} is an existing cluster\n"

    def up(self, home: ClusterRecord, say: Say) -> None:
        raise Refused(f"{self.spec.name} is an existing cluster (provider: existing), which Muster does not start")

    def down(self, home: ClusterRecord, say: Say) -> None:
        raise Refused(f"{self.spec.name} is an existing cluster (provider: existing), which Muster does not end")

    @contextmanager
    def connection(self, home: ClusterRecord | None) -> Iterator[Dashboard]:
        token = self._token()
        if self.spec.ssh is None:
            yield Dashboard(self.spec.address, token, self.spec.address)
            return
        address = urlsplit(self.spec.address)
        login = Login(self.spec.user, self.spec.ssh_port, self.spec.key, self.spec.ssh_options)
        with tunnel(self.spec.ssh, login, address.hostname or "", address.port or 8265) as port:
            yield Dashboard(f"http://127.0.0.1:{port}", token, f"{self.spec.address} through {self.spec.ssh}")

    def doctor(self) -> list[Finding]:
        try:
            with self.connection(None) as connection:
                return [Finding("Ray", True, f"{connection.version()}, {len(connection.nodes())} machines are up")]
        except ClusterError as error:
            return [Finding("Ray", False, str(error))]

    def _token(self) -> str | None:
        if self.spec.token_file is not None:
            return _read(Path(self.spec.token_file))
        if token := os.environ.get("RAY_AUTH_TOKEN"):
            return token
        if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
            return _read(Path(path))
        usual = Path.home() / ".ray" / "auth_token"
        return _read(usual) if usual.exists() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise Refused(f"{path}: the token cannot be read: {error.strerror}") from None


PROVIDER = ExistingProvider
