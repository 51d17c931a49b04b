"""Routing by path and method, and the answers to unknown paths and methods.

Promises JSON on every path and method, and that a path answers the same with a slash at its end.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serve_app.api.error_shapes import error_shape
from serve_app.api.errors import ApiError
from serve_app.api.http.endpoint import error_response
from serve_app.api.http.guard import Guard
from serve_app.api.http.middleware import RequestScope
from serve_app.api.http.pages import Pages
from serve_app.observability.metrics import MetricsSink


def application(
    routes: Sequence[Route],
    metrics: MetricsSink,
    pages: Pages,
    guard: Guard,
    unserved: Callable[[str], ApiError | None] = lambda path: None,
) -> Starlette:
    """An application of these routes, with the middleware and the error handler for every request.

    `unserved`: the refusal of an unknown path that deserves one of its own.
    """
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestScope, metrics=metrics, pages=pages, guard=guard, error_shape=error_shape)],
        exception_handlers={HTTPException: partial(_http_error, unserved)},
    )
    app.router.redirect_slashes = False
    return app


def route(path: str, endpoint: Callable[[Request], Awaitable[Response]] | ASGIApp, *methods: str) -> Route:
    """A route for one path; without `methods` it accepts all of them.

    `Route` itself would add HEAD to GET, and HEAD would generate an answer that nobody reads.
    """
    made = Route(path, endpoint)
    made.methods = set(methods) or None
    return made


async def _http_error(unserved: Callable[[str], ApiError | None], request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        nothing = ApiError(404, f"Nothing is served at {request.url.path[:100]}.", code="not_found")
        own_path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        answer = unserved(own_path) or nothing
    else:
        methods = sorted({*(error.headers or {}).get("Allow", "").split(", "), "OPTIONS"} - {""})
        allow = {"allow": ", ".join(methods)}
        if request.method == "OPTIONS":
            return Response(json.dumps({"methods": methods}), 200, allow, media_type="application/json")
        message = f"{request.method[:20]} is not served at {request.url.path[:100]}; send {' or '.join(methods)}."
        answer = ApiError(error.status_code, message, code="method_not_allowed", headers=allow)
    return error_response(request.scope, answer)
