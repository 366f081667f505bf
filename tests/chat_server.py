"""A stand-in for a teacher behind OpenAI's chat completions, with the troubles of real ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Trouble = Callable[["Handler", int], bool]
"""Takes a request and its number, from 0; True where it has answered in place of the teacher."""


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]], trouble: Trouble | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.trouble = trouble
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
            self.server.authorizations.append(self.headers.get("Authorization"))
        if self.server.trouble is None or not self.server.trouble(self, number):
            self.send(200, self.server.answer(request))

    def send(self, code: int, body: Any, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def cut(self) -> None:
        """Promise more than is sent."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.close_connection = True


def completion(content: str, reasoning: str | None = None, finish: str = "stop", tokens: int = 5) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    usage = {"completion_tokens": tokens}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def adding(request: dict[str, Any]) -> dict[str, Any]:
    """Answer "a + b" by its seed: in one of three lengths, one answer in four wrong."""
    a, _, b = request["messages"][-1]["content"].split()[-3:]
    seed = request["seed"]
    wrong = seed % 4 == 0
    thought = " ".join(["hm"] * (1 + seed % 3))
    return completion(str(int(a) + int(b) + wrong), thought, tokens=3 + seed % 3)


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], dict[str, Any]] = adding, trouble: Trouble | None = None, delay_s: float = 0.0
) -> Iterator[ChatServer]:
    def slow(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(delay_s)
        return answer(request)

    server = ChatServer(slow if delay_s else answer, trouble)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
