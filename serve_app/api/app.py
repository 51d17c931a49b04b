"""The HTTP application: which path goes where.

Promises an error in the shape of the client's wire format on every path and method. Knows no Ray: its caller provides
the service and the sink.
"""

from __future__ import annotations

from functools import partial

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from serve_app.access.reservations import Quotas
from serve_app.api.anthropic.messages import MessagesFormat
from serve_app.api.anthropic.models import AnthropicModels
from serve_app.api.error_shapes import ANTHROPIC_VERSION
from serve_app.api.http.chat_page import chat_page
from serve_app.api.http.endpoint import Admission, Call, Counted, Endpoint, Handler
from serve_app.api.http.guard import Guard
from serve_app.api.http.pages import Pages
from serve_app.api.http.probes import MetricsText, no_metrics, probes
from serve_app.api.http.routing import application, route
from serve_app.api.http.sse import EventStream, StreamSettings
from serve_app.api.jina import JinaFormat
from serve_app.api.native import NativeFormat
from serve_app.api.openai.chat import ChatFormat
from serve_app.api.openai.completions import TextFormat
from serve_app.api.openai.models import Models
from serve_app.api.openai.render import Render
from serve_app.api.openai.tokenize import Tokenization
from serve_app.api.openai.unserved import unserved
from serve_app.api.openapi.pages import pages as pages_of_the_api
from serve_app.api.respond import Responder
from serve_app.api.responses.answers import KeptAnswers
from serve_app.api.responses.conversation import ConversationReader
from serve_app.api.responses.endpoints import Responses
from serve_app.api.responses.format import ResponsesFormat
from serve_app.api.responses.kept import KeptResponses
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
    *,
    responses: ResumableStreams,
    keep_responses: bool = True,
    guard: Guard | None = None,
    quotas: Quotas | None = None,
    metrics_text: MetricsText = no_metrics,
) -> Starlette:
    """The ASGI application of one ingress replica: one process, one event loop.

    `responses` are the streams of /v1/responses; `keep_responses` is their default of `store`. `guard`: by default one
    that asks for no keys. Without `quotas`, nobody's limits are counted. `metrics_text`: what `/metrics` answers.
    """
    guard = guard or Guard()
    settings = stream_settings or StreamSettings(config.heartbeat_s, config.slow_reader_bytes)
    admission = Admission(config.max_streams, metrics)
    refuse_unknown_fields = config.unknown_fields == "refuse"
    native, jina = NativeFormat(service), JinaFormat(service)
    chat = ChatFormat(service, refuse_unknown_fields=refuse_unknown_fields)
    text = TextFormat(service, refuse_unknown_fields=refuse_unknown_fields)
    messages = MessagesFormat(service, refuse_unknown_fields=refuse_unknown_fields)
    kept = KeptResponses(service, responses)
    reader = ConversationReader(service, kept)
    response = ResponsesFormat(service, reader, refuse_unknown_fields=refuse_unknown_fields, keeps=keep_responses)
    resume = Resume(service, streams, (native, jina, chat, text, messages, response), settings)
    responder = Responder(service, resume, settings)
    answers = KeptAnswers(kept, settings, metrics)
    by_id = Responses(service, response, reader, kept, answers, responder)
    tokenization = Tokenization(service, refuse_unknown_fields=refuse_unknown_fields)
    models, anthropic_models = Models(service), AnthropicModels(service)
    list_models = _for_client(models.handle_list, anthropic_models.handle_list)
    one_model = _for_client(models.handle_one, anthropic_models.handle_one)

    def endpoint(
        path: str,
        handler: Handler,
        *methods: str,
        get_with_body: bool = False,
        reads_body: bool = True,
        counted: Counted = Counted.REQUEST,
    ) -> Route:
        made = Endpoint(
            path,
            handler,
            admission,
            config,
            get_with_body=get_with_body,
            reads_body=reads_body,
            quotas=quotas,
            counted=counted,
        )
        return route(path, made, *methods)

    generates = partial(endpoint, counted=Counted.GENERATION)

    routes = [
        generates("/stream", _stream(responder, native, jina), "GET", "POST", get_with_body=True),
        generates("/v1/chat/completions", partial(responder.answer, chat), "POST"),
        generates("/v1/completions", partial(responder.answer, text), "POST"),
        endpoint("/v1/chat/completions/render", Render(responder, chat, service.tokenizer).handle, "POST"),
        endpoint("/v1/completions/render", Render(responder, text, service.tokenizer).handle, "POST"),
        endpoint("/tokenize", tokenization.handle_tokenize, "POST"),
        endpoint("/detokenize", tokenization.handle_detokenize, "POST"),
        endpoint("/tokenizer_info", tokenization.handle_info, "GET"),
        generates("/v1/messages", partial(responder.answer, messages), "POST"),
        endpoint("/v1/messages/count_tokens", messages.handle_count, "POST"),
        *by_id.routes(endpoint),
        endpoint(ENDPOINT, _by_method(resume), "GET", "DELETE", counted=Counted.NOTHING),
        endpoint("/v1/models", list_models, "GET", "HEAD"),
        endpoint("/v1/models/{model:path}", one_model, "GET", "HEAD"),
        *probes(service.state, service.sampling_defaults, guard, metrics_text),
        *pages_of_the_api(),
        *chat_page(),
    ]
    return application(routes, metrics, pages, guard, unserved)


def _stream(responder: Responder, native: NativeFormat, jina: JinaFormat) -> Handler:
    """The handler of /stream, where Jina's client sends GET with a body."""

    async def handle(call: Call) -> Response | EventStream:
        from_jina = call.method == "GET" and call.body is not None
        return await responder.answer(jina if from_jina else native, call)

    return handle


def _by_method(resume: Resume) -> Handler:
    """The handler of a stream's own path: its rest, or its end."""

    async def handle(call: Call) -> Response | EventStream:
        return await (resume.cancel if call.method == "DELETE" else resume.handle)(call)

    return handle


def _for_client(handler: Handler, for_anthropic: Handler) -> Handler:
    """The handler of a path that Anthropic's clients ask for too, and read in another schema."""

    async def handle(call: Call) -> Response | EventStream:
        return await (for_anthropic if ANTHROPIC_VERSION in call.headers else handler)(call)

    return handle
