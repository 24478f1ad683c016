"""Spot notices, asked of a metadata service on loopback that answers as the clouds' do."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launcher.workers import preemption
from tests.support.raw_server import CUT, ODD_JSON, RawServer, whole


class Metadata(BaseHTTPRequestHandler):
    """Says of this machine what `taken_back` is: nothing, or its end. Refuses questions without the clouds' headers."""

    taken_back = False

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "a token") if asked else self.answer(400)

    def do_GET(self) -> None:
        path, headers = self.path, self.headers
        if path == "/latest/meta-data/spot/instance-action" and headers["X-aws-ec2-metadata-token"] == "a token":
            if self.taken_back:
                self.answer(200, json.dumps({"action": "terminate", "time": "2026-01-01T08:22:00Z"}))
            else:
                self.answer(404)
        elif path == "/computeMetadata/v1/instance/preempted" and headers["Metadata-Flavor"] == "Google":
            self.answer(200, "TRUE" if self.taken_back else "FALSE")
        elif path == "/metadata/scheduledevents?api-version=2020-07-01" and headers["Metadata"] == "true":
            reboot = {"EventType": "Reboot", "NotBefore": "Mon"}
            preempt = {"EventType": "Preempt", "NotBefore": "Mon, 19 Sep 2026 18:29:47 GMT"}
            self.answer(200, json.dumps({"Events": [reboot, preempt] if self.taken_back else [reboot]}))
        else:
            self.answer(403)


@pytest.fixture
def metadata(monkeypatch):
    """The handler's class; the service is where Muster looks for one."""
    handler = type("Here", (Metadata,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MUSTER_METADATA_URL", f"http://127.0.0.1:{server.server_port}/")
    yield handler
    server.shutdown()
    server.server_close()


SAID = {
    "aws": "AWS will terminate it at 2026-01-01T08:22:00Z",
    "gcp": "GCP preempts it",
    "azure": "Azure preempts it at Mon, 19 Sep 2026 18:29:47 GMT",
}


@pytest.mark.parametrize("cloud", SAID)
def test_a_notice_is_understood_and_its_absence_too(metadata, cloud):
    assert preemption.notice(cloud) is None
    metadata.taken_back = True
    assert preemption.notice(cloud) == SAID[cloud]


@pytest.mark.parametrize("cloud", SAID)
def test_a_service_that_does_not_answer_says_nothing(monkeypatch, cloud):
    monkeypatch.setenv("MUSTER_METADATA_URL", "http://127.0.0.1:9")
    assert preemption.notice(cloud) is None


def test_a_machine_that_is_in_no_cloud_asks_nobody(monkeypatch, metadata):
    monkeypatch.setenv("MUSTER_CLOUD", "none")
    metadata.taken_back = True
    assert preemption.cloud() is None
    assert preemption.Listener().said is None


def test_the_listener_hears_a_notice_that_comes_later(monkeypatch, metadata):
    monkeypatch.setenv("MUSTER_CLOUD", "gcp")
    monkeypatch.setattr(preemption, "_EVERY_S", 0.05)
    listener = preemption.Listener()
    time.sleep(0.2)
    assert listener.said is None
    metadata.taken_back = True
    deadline = time.monotonic() + 60
    while listener.said is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert listener.said == "GCP preempts it"


@pytest.mark.parametrize("where", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("reply", [*CUT.values(), *map(whole, ODD_JSON.values())])
def test_a_reply_that_is_none_is_no_notice(monkeypatch, where, reply):
    with RawServer(reply) as server:
        monkeypatch.setenv("MUSTER_METADATA_URL", server.url)
        assert preemption.notice(where) is None
        assert server.asked
