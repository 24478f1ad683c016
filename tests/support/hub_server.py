"""A Hugging Face hub on this machine: models and data sets with commits and branches, over the protocol that its client
speaks; and commands of `muster` that use it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Commits, each with its files; the last is `main` unless a branch says otherwise."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Hub:
    """Repositories by kind and name (`models owner/name`), and what was asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def at(self, kind: str, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | str:
        """The commit and its files, or the hub's code for what there is not."""
        repository = self.repositories.get(f"{kind} {name}")
        if repository is None:
            return "RepoNotFound"
        sha = repository.branches.get(revision or "main", revision or "")
        return (sha, repository.commits[sha]) if sha in repository.commits else "RevisionNotFound"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub for the length of the block, at `hub.url`."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append(f"{self.command} {unquote(self.path)}")
        if found := API.fullmatch(path):
            kind, name, what, revision, rest = found.groups()
            at = self.served.at(kind, name, revision)
            if isinstance(at, str):
                self._missing(at)
            elif what in (None, "revision"):
                self._info(name, *at)
            elif what == "tree":
                self._tree(rest, at[1])
            else:
                self._paths(json.loads(body) if body.startswith(b"{") else parse_qs(body.decode()), at[1])
        elif found := RESOLVE.fullmatch(path):
            data_set, name, revision, file = found.groups()
            at = self.served.at("datasets" if data_set else "models", name, revision)
            self._missing(at) if isinstance(at, str) else self._file(file, *at)
        else:
            self._missing("EntryNotFound")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _info(self, name: str, sha: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": file} for file in files]
        self._json({"id": name, "_id": sha[:24], "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, folder: str, files: dict[str, bytes]) -> None:
        inside = {file: content for file, content in files.items() if not folder or file.startswith(f"{folder}/")}
        if folder and not inside:
            return self._missing("EntryNotFound")
        below = {file.removeprefix(f"{folder}/") if folder else file: file for file in inside}
        prefix = f"{folder}/" if folder else ""
        folders = {name.partition("/")[0] for name in below if "/" in name}
        recursive = "recursive=true" in self.path.lower()
        shown = [file for name, file in below.items() if recursive or "/" not in name]
        entries = [
            {"type": "directory", "path": prefix + name, "oid": _oid(name.encode()), "size": 0} for name in folders
        ]
        self._json([*entries, *(_entry(file, inside[file]) for file in shown)])

    def _paths(self, asked: Any, files: dict[str, bytes]) -> None:
        self._json([_entry(file, files[file]) for file in asked.get("paths", []) if file in files])

    def _file(self, file: str, sha: str, files: dict[str, bytes]) -> None:
        if file not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content, headers = (
            files[file],
            {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"},
        )
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers)
        self._send(200, content, headers)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(file: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(content), "oid": _oid(content)}


_COMMANDS = """
import json, sys
from typer.testing import CliRunner
from launcher.cli.main import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, result.output]))
"""


def run_commands(folder: Path, environment: dict[str, str], *commands: list[str]) -> list[str]:
    """What commands of `muster` print that end well, in a process of its own: the hub's library
    reads the environment once."""
    here = {**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(Path(__file__).parents[2])}
    call = [sys.executable, "-c", _COMMANDS, json.dumps(commands)]
    done = subprocess.run(
        call, cwd=folder, env={**here, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [status for status, _ in answers] == [0] * len(commands), (answers, done.stderr[-4000:])
    return [output for _, output in answers]
