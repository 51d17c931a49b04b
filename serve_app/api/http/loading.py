"""The application of an ingress that has no tokenizer yet: the two probes, the chat page, which shows how far the model
is, and 503 for everything else.

Promises the same probes, errors, request ids and access lines as the whole application, without its imports.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.chat_page import chat_page
from serve_app.api.http.guard import Guard
from serve_app.api.http.pages import Pages
from serve_app.api.http.probes import MetricsText, no_metrics, probes
from serve_app.api.http.routing import application, route
from serve_app.core import LoadStage, ModelCard, not_ready
from serve_app.observability.metrics import MetricsSink


def create_loading_app(
    state: Callable[[], Awaitable[ModelCard | LoadStage]],
    metrics: MetricsSink,
    pages: Pages,
    guard: Guard | None = None,
    metrics_text: MetricsText = no_metrics,
) -> Starlette:
    """The application of an ingress that is still loading. `state`: the model's card, or how far it is with loading.

    `guard`: by default one that asks for no keys. `metrics_text`: what `/metrics` answers.
    """
    guard = guard or Guard()

    async def refuse(request: Request) -> Response:
        stage = await state()
        raise not_ready(stage if isinstance(stage, LoadStage) else LoadStage("loading the tokenizer"))

    routes = [*probes(state, {}, guard, metrics_text), *chat_page(), route("/{path:path}", refuse)]
    return application(routes, metrics, pages, guard)
