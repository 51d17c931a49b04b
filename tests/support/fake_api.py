"""A server that speaks serve_app's HTTP API without a model: each test scripts what a path answers.

Plain sockets underneath, so that it can also do what a good server does not: stall, garble, drop the connection.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Exchange:
    """One request, and the means to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self._handler = handler
        self.method = handler.command
        self.path = handler.path
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.start(status, {"Content-Length": str(len(content)), **(headers or {})})
        self._handler.wfile.write(content)

    def refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.answer(status, {"error": error}, headers)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()

    def start_stream(self, headers: dict[str, str] | None = None) -> None:
        self.start(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **(headers or {})})

    def write(self, data: bytes) -> None:
        """One chunk. Raises OSError once the client has gone."""
        self._handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def token(self, index: int, text: str) -> None:
        self.write(b"data: " + json.dumps({"token_id": index, "generated_text": text}).encode() + b"\n\n")

    def done(self, completion_tokens: int, finish_reason: str = "stop", seed: int = 7) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": completion_tokens, "total_tokens": 3 + completion_tokens}
        body = {"finish_reason": finish_reason, "usage": usage, "seed": seed}
        self.write(b"event: done\ndata: " + json.dumps(body).encode() + b"\n\n")

    def end_stream(self) -> None:
        self._handler.wfile.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Close the connection without an ending."""
        self._handler.close_connection = True

    def wait_until_gone(self, timeout_s: float = 60.0) -> bool:
        """Whether the client closes its side within the time."""
        connection = self._handler.connection
        connection.settimeout(timeout_s)
        try:
            return connection.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


Route = Callable[[Exchange], None]


@dataclass
class FakeApi:
    """A running fake: `url`, what each path does, and what was asked."""

    url: str
    port: int
    routes: dict[str, Route] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)

    def asked(self, path: str) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.path == path]


def say(*pieces: str, headers: dict[str, str] | None = None) -> Route:
    """A /stream that answers with these pieces, whatever it is asked."""

    def route(exchange: Exchange) -> None:
        exchange.start_stream(headers)
        for index, piece in enumerate(pieces):
            exchange.token(index, piece)
        exchange.done(len(pieces))
        exchange.end_stream()

    return route


def ready(exchange: Exchange) -> None:
    exchange.answer(200, {"status": "ready"})


def models(exchange: Exchange) -> None:
    entry = {"id": "fake-1", "object": "model", "created": 1, "owned_by": "tests", "max_model_len": 2048}
    exchange.answer(200, {"object": "list", "data": [entry]})


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    """A fake on a free port of this machine, until the block ends."""
    api = FakeApi("", 0, {"/ready": ready, "/v1/models": models, "/stream": say("Hello", " there", ".")})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond()

        def do_POST(self) -> None:
            self._respond()

        def _respond(self) -> None:
            exchange = Exchange(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            api.exchanges.append(exchange)
            route = api.routes.get(self.path)
            try:
                if route is None:
                    exchange.refuse(404, "not_found", f"There is no {self.path}.")
                else:
                    route(exchange)
            except ConnectionError:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Tests read what was asked from `exchanges`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.port = server.server_address[1]
    api.url = f"http://127.0.0.1:{api.port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
