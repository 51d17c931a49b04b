"""The chat page at `/` and its files, which a browser gets without a key.

Promises that exactly these files are open, that the page loads nothing from another host, and that a file is compressed
once and kept by the browser until the page changes. Knows no model: the page itself asks the API.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from importlib.resources.abc import Traversable
from string import Template

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.errors import ApiError

_FOLDERS = ("chat", "vendor")
"""Folders of `serve_app/ui` whose files the page uses."""
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Suffixes of the files that are served. Licences, the manifest and the page's template are not."""
_TEMPLATE = "chat/index.html"
_FIRST = ("chat/", "vendor/marked/", "vendor/dompurify/")
"""Modules that every visit needs. The browser loads the others (highlighting) when an answer has code."""
_FILE_PATH = re.compile(r"/ui/[0-9a-f]{16}/([\w./-]+)")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
_SAFE = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_PAGE_HEADERS = {**_SAFE, "content-security-policy": _POLICY, "cache-control": "no-cache"}
_KEPT = "public, max-age=31536000, immutable"
"""For a file under the version of this page: its content never changes."""


def chat_page() -> list[Route]:
    """The routes."""
    return [
        Route("/", _page, methods=["GET"]),
        Route("/ui/{version}/{name:path}", _file, methods=["GET"]),
    ]


def is_open(method: str, path: str) -> bool:
    """Whether a request is for the page or one of its files, which hold no secret."""
    if method not in ("GET", "HEAD"):
        return False
    match = _FILE_PATH.fullmatch(path)
    return path == "/" or (match is not None and match[1] in _contents())


@dataclass(frozen=True, slots=True)
class _Content:
    """One file as it is sent."""

    plain: bytes
    compressed: bytes
    etag: str
    media_type: str

    def answer(self, request: Request, headers: dict[str, str]) -> Response:
        sent = {**headers, "etag": self.etag, "vary": "accept-encoding"}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=sent)
        sent["content-type"] = self.media_type
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.compressed, headers={**sent, "content-encoding": "gzip"})
        return Response(self.plain, headers=sent)


def _content(plain: bytes, media_type: str) -> _Content:
    compressed = gzip.compress(plain, 9, mtime=0)
    return _Content(plain, compressed, f'"{sha256(plain).hexdigest()[:32]}"', media_type)


def _takes_gzip(accepted: str) -> bool:
    """Whether `Accept-Encoding` allows gzip (RFC 9110, 12.5.3)."""
    for entry in accepted.lower().split(","):
        name, _, weight = entry.partition(";")
        if name.strip() in ("gzip", "*"):
            return weight.replace(" ", "").rstrip(".0") not in ("q=", "q")
    return False


@cache
def _plain_files() -> dict[str, bytes]:
    """Path below `serve_app/ui` -> content, of every file that is served."""
    root = files("serve_app.ui")
    return dict(sorted(item for folder in _FOLDERS for item in _below(root.joinpath(folder), folder)))


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        name = f"{path}/{entry.name}"
        if entry.is_dir():
            yield from _below(entry, name)
        elif _suffix(name) in _MEDIA_TYPES:
            yield name, entry.read_bytes()


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]


@cache
def _contents() -> dict[str, _Content]:
    """The same, compressed: some 30 ms, when a browser first asks for the page."""
    return {name: _content(plain, _MEDIA_TYPES[_suffix(name)]) for name, plain in _plain_files().items()}


@cache
def version() -> str:
    """Changes whenever a file does: part of the files' URLs."""
    digest = sha256()
    for name, plain in _plain_files().items():
        digest.update(f"{name}\0{len(plain)}\0".encode() + plain)
    return digest.hexdigest()[:16]


@cache
def _page_content(root: str) -> _Content:
    """The page below a route prefix."""
    base = f"{root}/ui/{version()}"
    modules = [name for name in _plain_files() if name.startswith(_FIRST) and name.endswith(".js")]
    preloads = "\n    ".join(f'<link rel="modulepreload" href="{base}/{name}">' for name in modules)
    template = Template(files("serve_app.ui").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    text = template.substitute(root=root, base=base, preloads=preloads)
    return _content(text.encode(), "text/html; charset=utf-8")


async def _page(request: Request) -> Response:
    root = escape(request.scope.get("root_path", "").rstrip("/"))
    return _page_content(root).answer(request, _PAGE_HEADERS)


async def _file(request: Request) -> Response:
    found = _contents().get(request.path_params["name"])
    if found is None:
        raise ApiError(404, f"Nothing is served at {request.url.path[:100]}.", code="not_found")
    # While a new version is rolled out, a page may ask an ingress of the other version for a file.
    kept = _KEPT if request.path_params["version"] == version() else "no-cache"
    return found.answer(request, {**_SAFE, "cache-control": kept})
