"""`/openapi.json`, and `/docs`: a page that shows it and sends requests.

Promises that the page loads nothing from another server.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib.resources import files
from string import Template

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.errors import ApiError
from serve_app.api.openapi.document import openapi_document

_ASSETS = {
    "swagger-ui.css": ("swagger/swagger-ui.css", "text/css; charset=utf-8"),
    "swagger-ui-bundle.js": ("swagger/swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    "favicon-32x32.png": ("swagger/favicon-32x32.png", "image/png"),
    "reference.js": ("reference.js", "text/javascript; charset=utf-8"),
}
"""Name in the page -> file in `serve_app/ui`, media type."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
_ASSET_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "max-age=3600"}


def pages() -> list[Route]:
    """The routes."""
    return [
        Route("/openapi.json", _document, methods=["GET"]),
        Route("/docs", _page, methods=["GET"]),
        Route("/docs/{name}", _asset, methods=["GET"]),
    ]


@cache
def _document_bytes() -> bytes:
    """Made once, when it is first asked for: that takes about 50 ms."""
    return json.dumps(openapi_document(), ensure_ascii=False).encode()


async def _document(request: Request) -> Response:
    return Response(_document_bytes(), media_type="application/json")


async def _page(request: Request) -> Response:
    root = escape(request.scope.get("root_path", "").rstrip("/"))
    text = Template(_read("reference.html").decode()).substitute(root=root)
    return Response(text, headers=_PAGE_HEADERS, media_type="text/html")


async def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _ASSETS:
        raise ApiError(404, f"Nothing is served at {request.url.path[:100]}.", code="not_found")
    path, media_type = _ASSETS[name]
    return Response(_read(path), headers={**_ASSET_HEADERS, "content-type": media_type})


@cache
def _read(path: str) -> bytes:
    return files("serve_app.ui").joinpath(path).read_bytes()
