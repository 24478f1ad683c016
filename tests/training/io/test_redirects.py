"""A key is for the address that it was meant for: a redirect to another origin does not get it."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.dashboard import Dashboard
from cluster.errors import ClusterError
from launcher.inference.teacher import Budget, Endpoint, Teacher
from training.errors import TrainingError
from training.io import hub

KEY = "of-nobody-else"


class Origin:
    """A server that sends everybody on to `to`, or answers; it remembers what it was asked with."""

    def __init__(self, to: str | None = None):
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                outer.asked.append((self.path, self.headers["Authorization"]))
                body = b'{"ray_version": "1"}'
                if to is not None and not self.path.startswith("/here"):
                    self.send_response(302)
                    self.send_header("Location", to)
                    body = b""
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def keys(self) -> set[str | None]:
        return {key for _, key in self.asked}


@contextmanager
def two() -> Iterator[tuple[Origin, Origin]]:
    """An origin that sends on to another one."""
    other = Origin()
    first = Origin(to=f"{other.url}/elsewhere")
    try:
        yield first, other
    finally:
        for origin in (first, other):
            origin.server.shutdown()
            origin.server.server_close()


def test_the_key_of_a_teacher(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with two() as (first, other):
        endpoint = Endpoint(
            url=first.url, model="m", key_env="TEACHER_KEY", max_new_tokens=8, timeout_s=10, patience_s=1
        )
        with pytest.raises(TrainingError):  # what the other one answers is no answer
            Teacher(endpoint, Budget()).ask([{"role": "user", "content": "?"}])
        assert first.keys() == {f"Bearer {KEY}"}
        assert other.keys() == {None}


def test_the_token_of_a_cluster():
    with two() as (first, other):
        assert Dashboard(first.url, KEY, "x").version() == "1"
        assert (first.keys(), other.keys()) == ({f"Bearer {KEY}"}, {None})


def test_the_token_of_a_cluster_for_its_jobs():
    """Through Ray's own client."""
    from ray.job_submission import JobSubmissionClient

    with two() as (first, other):
        with pytest.raises((RuntimeError, ClusterError, KeyError, TypeError)):
            client = JobSubmissionClient(first.url, headers={"Authorization": f"Bearer {KEY}"})
            client.list_jobs()
        assert first.keys() <= {f"Bearer {KEY}"}
        assert other.keys() <= {None}


def test_the_token_of_the_hub_stays_within_its_origin():
    with two() as (first, other):
        request = urllib.request.Request(first.url, headers={"Authorization": f"Bearer {KEY}"})
        assert json.loads(hub.fetch(request, 10)) == {"ray_version": "1"}
        assert (first.keys(), other.keys()) == ({f"Bearer {KEY}"}, {None})
    renamed = Origin(to="/here")
    hub.fetch(urllib.request.Request(renamed.url, headers={"Authorization": f"Bearer {KEY}"}), 10)
    assert renamed.asked == [("/", f"Bearer {KEY}"), ("/here", f"Bearer {KEY}")]
    renamed.server.shutdown()
    renamed.server.server_close()
