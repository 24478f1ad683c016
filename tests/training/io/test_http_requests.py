"""A request is answered as a whole and in time, or fails with an error of one type, whatever a real server sends."""

from __future__ import annotations

import urllib.request

import pytest

from tests.support.raw_server import CUT, DRIPPING, OK, RawServer, whole
from training.io.http_requests import RequestError, StatusError, fetch


def answered(server: RawServer, timeout_s: float = 20.0) -> bytes:
    return fetch(urllib.request.Request(server.url, b"{}"), timeout_s)


def failed(server: RawServer, timeout_s: float = 20.0) -> RequestError:
    with pytest.raises(RequestError) as caught:
        answered(server, timeout_s)
    return caught.value


@pytest.mark.parametrize(
    "reply",
    [
        whole({"scores": [1]}),
        OK + b'\r\n{"scores": [1]}',
        OK + b'Transfer-Encoding: chunked\r\n\r\n9\r\n{"scores"\r\n6\r\n: [1]}\r\n0\r\n\r\n',
    ],
    ids=["by its length", "to the end of the connection", "in chunks"],
)
def test_a_whole_answer_comes_back(reply):
    with RawServer(reply) as server:
        assert answered(server) == b'{"scores": [1]}'


@pytest.mark.parametrize("reply", CUT)
def test_a_reply_that_is_cut_may_pass(reply):
    with RawServer(CUT[reply]) as server:
        error = failed(server)
    assert type(error) is RequestError
    assert error.may_pass
    assert str(error)


@pytest.mark.timeout(60)  # else it would go on for ever
@pytest.mark.parametrize("part", DRIPPING)
def test_the_time_limit_is_for_the_whole_answer(part):
    with RawServer(DRIPPING[part]) as server:
        assert str(failed(server, 0.5)) == "no whole answer within 0.5 s"


def test_an_answer_may_be_too_large(monkeypatch):
    monkeypatch.setattr("training.io.http_requests._LONGEST_BYTES", 1 << 20)
    with RawServer(whole(b"x" * (2 << 20))) as server:
        assert "more than 1 MiB" in str(failed(server))


def test_nobody_at_the_address_may_pass():
    with pytest.raises(RequestError, match="refused"):
        fetch(urllib.request.Request("http://127.0.0.1:1"), 5)


@pytest.mark.parametrize(
    ("status", "may_pass"), [(400, False), (401, False), (404, False), (429, True), (500, True), (529, True)]
)
def test_a_status_says_whether_it_may_pass(status, may_pass):
    with RawServer(b"HTTP/1.1 %d Why\r\nRetry-After: 7\r\nContent-Length: 9\r\n\r\nno,\n not!" % status) as server:
        error = failed(server)
    assert isinstance(error, StatusError)
    assert (error.code, error.may_pass, error.said) == (status, may_pass, "no, not!")
    assert error.headers["Retry-After"] == "7"


def test_a_status_whose_reason_is_cut_is_one_all_the_same():
    with RawServer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n") as server:
        assert str(failed(server)) == "HTTP 404: Not Found"
