"""The HTTP application: which path goes where.

Promises OpenAI's error shape on every path and method. Knows no Ray: its caller provides the service and the sink.
"""

from __future__ import annotations

from functools import partial

from starlette.applications import Starlette
from starlette.routing import Route

from serve_app.api.http.endpoint import Admission, Endpoint, Handler
from serve_app.api.http.pages import Pages
from serve_app.api.http.probes import probes
from serve_app.api.http.routing import application, route
from serve_app.api.http.sse import StreamSettings
from serve_app.api.native import NativeFormat
from serve_app.api.openai.chat import ChatFormat
from serve_app.api.openai.completions import TextFormat
from serve_app.api.openai.models import Models
from serve_app.api.respond import Responder
from serve_app.api.resume import ENDPOINT, Resume
from serve_app.config import ApiConfig
from serve_app.generation.service import CompletionService
from serve_app.observability.metrics import MetricsSink
from serve_app.resume.registry import ResumableStreams


def create_app(
    service: CompletionService,
    streams: ResumableStreams,
    config: ApiConfig,
    metrics: MetricsSink,
    pages: Pages,
    stream_settings: StreamSettings | None = None,
) -> Starlette:
    """The ASGI application of one ingress replica: one process, one event loop."""
    settings = stream_settings or StreamSettings(config.heartbeat_s, config.slow_reader_bytes)
    admission = Admission(config.max_streams, metrics)
    refuse_unknown_fields = config.unknown_fields == "refuse"
    native = NativeFormat(service)
    chat = ChatFormat(service, refuse_unknown_fields=refuse_unknown_fields)
    text = TextFormat(service, refuse_unknown_fields=refuse_unknown_fields)
    resume = Resume(service, streams, (native, chat, text), settings)
    responder = Responder(service, resume, settings)
    models = Models(service)

    def endpoint(path: str, handler: Handler, *methods: str) -> Route:
        return route(path, Endpoint(path, handler, admission, config), *methods)

    routes = [
        endpoint("/stream", partial(responder.answer, native), "GET", "POST"),
        endpoint("/v1/chat/completions", partial(responder.answer, chat), "POST"),
        endpoint("/v1/completions", partial(responder.answer, text), "POST"),
        endpoint(ENDPOINT, resume.handle, "GET"),
        endpoint("/v1/models", models.handle_list, "GET", "HEAD"),
        endpoint("/v1/models/{model:path}", models.handle_one, "GET", "HEAD"),
        *probes(service.state, service.sampling_defaults),
    ]
    return application(routes, metrics, pages)
