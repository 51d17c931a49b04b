"""The HTTP application: which path goes where.

Promises OpenAI's error shape on every path and method. Knows no Ray: whoever runs it gives a service and a sink.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Route

from serve_app.api.http.endpoint import Admission, Endpoint, Handler
from serve_app.api.http.pages import Pages
from serve_app.api.http.probes import Probes
from serve_app.api.http.routing import application, route
from serve_app.api.http.sse import StreamSettings
from serve_app.api.native import NATIVE, Native
from serve_app.api.openai.answer import Answerer
from serve_app.api.openai.chat import CHAT, ChatCompletions
from serve_app.api.openai.completions import TEXT, Completions
from serve_app.api.openai.models import Models
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
    stream_settings: StreamSettings | None = None,
    pages: Pages | None = None,
) -> Starlette:
    """The ASGI application of one ingress replica: one process, one event loop."""
    settings = stream_settings or StreamSettings(config.heartbeat_s, config.slow_reader_bytes)
    admission = Admission(config.max_streams, metrics)
    resume = Resume(service, streams, (NATIVE, CHAT, TEXT), settings)
    answerer = Answerer(service, resume, settings, refuse_unknown_fields=config.unknown_fields == "refuse")
    native, models = Native(service, resume, settings), Models(service)
    probes = Probes(service.state, service.sampling_defaults)

    def endpoint(path: str, handler: Handler, *methods: str) -> Route:
        return route(path, Endpoint(path, handler, admission, config), *methods)

    routes = [
        endpoint("/stream", native.handle, "GET", "POST"),
        endpoint("/v1/chat/completions", ChatCompletions(answerer).handle, "POST"),
        endpoint("/v1/completions", Completions(answerer).handle, "POST"),
        endpoint(ENDPOINT, resume.handle, "GET"),
        endpoint("/v1/models", models.handle_list, "GET", "HEAD"),
        endpoint("/v1/models/{model:path}", models.handle_one, "GET", "HEAD"),
        *probes.routes(),
    ]
    return application(routes, metrics, pages or Pages(config))
