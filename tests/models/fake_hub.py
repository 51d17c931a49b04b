"""A model hub on 127.0.0.1 that speaks as much of the Hugging Face hub's API as fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """One repository, `team/model`, holding the files of `folder`."""

    folder: Path
    url: str = ""
    gated: bool = False
    fetched: list[str] = field(default_factory=list)
    """Names of the files whose contents were sent."""


@contextmanager
def serve_hub(folder: Path) -> Iterator[FakeHub]:
    """Serves until the block ends."""
    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    def names() -> list[str]:
        return sorted(str(p.relative_to(hub.folder)) for p in hub.folder.rglob("*") if p.is_file())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send_body=False)

        def do_GET(self) -> None:
            self._answer(send_body=True)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def _answer(self, send_body: bool) -> None:
            path = urlsplit(self.path).path
            known, revisions = "/team/model", ("main", "v1", COMMIT)
            if path == f"/api/models{known}":
                return self._info()
            if path.startswith(f"/api/models{known}/revision/"):
                return self._info() if path.rsplit("/", 1)[1] in revisions else self._refuse(404, "RevisionNotFound")
            if path.startswith(f"/api/models{known}/tree/"):
                return self._json([self._entry(name) for name in names()])
            if path.startswith(f"{known}/resolve/"):
                return self._file(path.split("/", 5)[5], send_body)
            return self._refuse(404 if "Authorization" in self.headers else 401, "RepoNotFound")

        def _info(self) -> None:
            siblings = [{"rfilename": name, "size": (hub.folder / name).stat().st_size} for name in names()]
            self._json({"id": "team/model", "modelId": "team/model", "sha": COMMIT, "siblings": siblings})

        def _entry(self, name: str) -> dict[str, object]:
            data = (hub.folder / name).read_bytes()
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        def _file(self, name: str, send_body: bool) -> None:
            if hub.gated:
                return self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
            data = (hub.folder / name).read_bytes()
            if send_body:
                hub.fetched.append(name)
            self._send(200, data, send_body, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
            return None

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", self.command == "GET", {"X-Error-Code": code, "X-Error-Message": code})

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), True, {"Content-Type": "application/json"})

        def _send(self, status: int, data: bytes, send_body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if send_body:
                self.wfile.write(data)

    return Handler
