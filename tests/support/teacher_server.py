"""A real HTTP server that speaks as OpenAI's does, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[int, dict[str, Any]], Any]
"""(number of the request, its body) -> a text that is the reply, (status, headers, body), or one of the words below."""
CUT, HANG, NONSENSE = "<cut>", "<hang>", "<nonsense>"


class TeacherServer:
    """`with TeacherServer(behave) as server:` listens on loopback at `server.url`."""

    def __init__(self, behave: Behaviour):
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        """How often each user's turn was asked."""
        self.at_once = self.most_at_once = 0
        self.times: list[float] = []
        self._lock = threading.Lock()

    def __enter__(self) -> TeacherServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    outer._answer(self, number, body)
                finally:
                    with outer._lock:
                        outer.at_once -= 1

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler, number: int, body: dict[str, Any]) -> None:
        said = self.behave(number, body)
        if said == HANG:
            time.sleep(5)
            return
        if said == CUT:
            handler.connection.close()
            return
        status, headers, text = said if isinstance(said, tuple) else (200, {}, said)
        if said == NONSENSE:
            text = "<html>welcome</html>"
        elif status == 200:
            self.asked[body["messages"][-1]["content"]] += 1
            text = json.dumps(
                {
                    "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 50},
                }
            )
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        data = text.encode()
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
