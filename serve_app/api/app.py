"""The HTTP application: which path goes where.

Promises OpenAI's error shape on every path and method. Knows no Ray: whoever runs it gives a service and a sink.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.endpoint import RECORD, Admission, Endpoint, Handler
from serve_app.api.errors import ApiError, not_found
from serve_app.api.middleware import RequestScope
from serve_app.api.native import NATIVE, Native
from serve_app.api.openai_answer import Answerer
from serve_app.api.openai_chat import CHAT, ChatCompletions
from serve_app.api.openai_completions import TEXT, Completions
from serve_app.api.openai_models import Models
from serve_app.api.probes import Probes
from serve_app.api.resume import ENDPOINT, Resume
from serve_app.api.service import CompletionService
from serve_app.api.sse import StreamSettings
from serve_app.config import ApiConfig
from serve_app.observability.logs import RequestRecord
from serve_app.observability.metrics import MetricsSink
from serve_app.streams.resumable_streams import ResumableStreams


def create_app(
    service: CompletionService,
    streams: ResumableStreams,
    config: ApiConfig,
    metrics: MetricsSink,
    stream_settings: StreamSettings | None = None,
) -> Starlette:
    """The ASGI application of one ingress replica: one process, one event loop."""
    settings = stream_settings or StreamSettings(config.heartbeat_s, config.slow_reader_bytes)
    admission = Admission(config.max_streams, metrics)
    resume = Resume(service, streams, (NATIVE, CHAT, TEXT), settings)
    answerer = Answerer(service, resume, settings, refuse_unknown_fields=config.unknown_fields == "refuse")
    native, models = Native(service, resume, settings), Models(service)
    probes = Probes(service.state)

    def route(path: str, handler: Handler, *methods: str) -> Route:
        made = Route(path, Endpoint(path, handler, admission, config))
        made.methods = set(methods)  # given to Route, GET would bring HEAD, which would generate for nobody
        return made

    middleware = [Middleware(RequestScope, metrics=metrics)]
    if config.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-seed", "x-stream-id", "x-ignored-fields", "retry-after"],
            )
        )
    app = Starlette(
        routes=[
            route("/stream", native.handle, "GET", "POST"),
            route("/v1/chat/completions", ChatCompletions(answerer).handle, "POST"),
            route("/v1/completions", Completions(answerer).handle, "POST"),
            route(ENDPOINT, resume.handle, "GET"),
            route("/v1/models", models.handle_list, "GET"),
            route("/v1/models/{model:path}", models.handle_one, "GET"),
            Route("/health", probes.health, methods=["GET"]),
            Route("/ready", probes.ready, methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    record: RequestRecord = request.scope[RECORD]
    if error.status_code == 404:
        answer = not_found(request.url.path)
    else:
        message = f"{request.method} is not served at {request.url.path}."
        answer = ApiError(error.status_code, message, code="method_not_allowed", headers=error.headers)
    record.outcome = answer.code or answer.type
    return answer.response()
