"""A chat endpoint on loopback for tests: answers by a function, counts what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]
"""Status, headers, and a body: JSON or bytes."""


class ChatServer:
    """What the endpoint saw."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply | str]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def reply(self, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.answer(body, number)
        finally:
            with self._lock:
                self._now -= 1
        return (200, {}, completion(reply)) if isinstance(reply, str) else reply


def completion(text: str, *, finish_reason: str = "stop", tokens: int = 10) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 2 * tokens, "completion_tokens": tokens},
    }


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Reply | str]) -> Iterator[ChatServer]:
    """A server that answers each request with ``answer(body, number)``: a text, or a whole reply."""
    state = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = state.reply({"path": self.path, **body}, dict(self.headers))
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
