"""The deployment that speaks HTTP and gRPC and handles text. It is up long before the model, and reports the loading.

Promises an answer to every request from the start: the application's, or 503 with the stage while the tokenizer or
the model is not loaded. Only connects the other packages of serve_app.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.access.keys import ApiKeys
from serve_app.access.reservations import Quotas
from serve_app.api.grpc.refusal import Refusal
from serve_app.api.grpc.servicer import Servicer
from serve_app.api.http.guard import PROBE_SECRET, Guard
from serve_app.api.http.loading import create_loading_app
from serve_app.api.http.pages import Pages
from serve_app.config import AppConfig, AuthConfig
from serve_app.core import GenerationDefaults, LoadStage, ModelCard
from serve_app.deployments.client_address import ClientAddresses
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.deployments.garbage import freeze
from serve_app.deployments.journal_actor import open_responses, open_streams
from serve_app.deployments.logs import use_serve_log
from serve_app.deployments.metrics import RayMetrics
from serve_app.deployments.node_metrics import NodeMetrics
from serve_app.deployments.quota_actor import open_quotas
from serve_app.deployments.ray_internals import AsgiDeployment, http_host
from serve_app.deployments.revisions import settled
from serve_app.deployments.serve_settings import missing
from serve_app.deployments.status.banner import Access, banner, log_folder, say, service_address
from serve_app.deployments.status.progress import ProgressBoard, Reporter
from serve_app.deployments.status.readiness import Readiness, answers, deployment_status
from serve_app.grammar_checker import GrammarChecker
from serve_app.home import expanded
from serve_app.models.cache import cache_directory
from serve_app.models.model_error import ModelError
from serve_app.observability.metrics import (
    JOURNAL_BYTES,
    JOURNALS,
    REQUESTS_IN_PROGRESS,
    RESPONSE_BYTES,
    RESPONSES,
)
from serve_app.resume.journal_store import StoreUnavailable
from serve_app.resume.registry import ResumableStreams

if TYPE_CHECKING:
    from serve_app.chat.prompts import PromptFormatter

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Interval of checks whether the model can serve, while the banner or an update waits for it."""
METRICS_PERIOD_S = 2.0
"""Interval of reports of gauges. To count the journals is one call to their store."""
RETRY_S = 30.0
"""Pause after a failed try to load the tokenizer: the network may come back."""
_KEPT = ((JOURNALS, JOURNAL_BYTES), (RESPONSES, RESPONSE_BYTES))
"""The metrics of the resumable streams, and those of the responses."""


@serve.ingress()
class Ingress(AsgiDeployment):
    """One replica, on a CPU. Holds no state that outlives a request."""

    async def __init__(self, config: AppConfig, model_server: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        """Return at once on a first start, to report how far the model is; else when this replica can serve the model.

        Raises `RuntimeError` in an update whose model can't be served, and `KeyFileError` if the keys can't be read.
        """
        use_serve_log()
        replica = serve.get_replica_context()
        scaling = config.model_server.autoscaling
        self._config = config
        self._app_name = replica.app_name
        self._board = board = ProgressBoard(replica.app_name, config)
        self._model_deployment = model_server.deployment_name
        may_sleep = scaling is not None and scaling.min_replicas == 0
        readiness = Readiness(board, replica.app_name, model_server.deployment_name, may_sleep=may_sleep)
        self._client = RayReplicaClient(model_server, readiness, config.admission.max_wait_s)
        self._metrics = RayMetrics()
        self._text_stage: LoadStage | None = LoadStage("loading the tokenizer")
        host = await asyncio.to_thread(http_host) or "127.0.0.1"
        self._pages = Pages(config.api, host)
        self._guard = await asyncio.to_thread(_guard, config.auth, host)
        self._node_metrics = NodeMetrics(replica.app_name)
        loading = create_loading_app(self._state, self._metrics, self._pages, self._guard, self._node_metrics.text)
        self._front = _Front(loading)
        self._servicer = Servicer(self._front.in_process, self._state, host)
        self._streams: tuple[ResumableStreams, ...] = ()
        """The resumable streams, and the responses; none while the tokenizer loads."""
        self._quotas: Quotas | None = None
        self._grammars: GrammarChecker | None = None
        tried = asyncio.Event()
        work = (self._load_text(tried), self._report_metrics(), self._guard.keys.watch())
        self._tasks = {asyncio.create_task(task) for task in work}
        if _speaks_for_all():
            self._tasks.add(asyncio.create_task(self._announce()))
        if await asyncio.to_thread(board.card) is not None:
            # Others serve this model already: Serve must not send requests here that they could answer.
            await tried.wait()
        elif await asyncio.to_thread(board.is_update):
            await self._let_others_answer(replica.deployment)

    async def __del__(self) -> None:
        """Awaited by Serve when this replica stops: other ingresses may take its resumable streams over."""
        await asyncio.gather(*(streams.aclose() for streams in self._streams), self._node_metrics.aclose())
        if self._quotas is not None:
            await self._quotas.aclose()
        if self._grammars is not None:
            await self._grammars.aclose()

    async def _let_others_answer(self, deployment: str) -> None:
        """In an update, wait for the new model while ingress replicas of the old one answer.

        Raises `RuntimeError` when the new model can't be served: Serve then keeps what it has.
        """
        while answers(await asyncio.to_thread(deployment_status, self._app_name, deployment)):
            state = await self._state()
            if isinstance(state, ModelCard):
                return
            if state.error:
                raise RuntimeError(state.error)
            await asyncio.sleep(POLL_S)

    def asgi_app(self) -> ASGIApp:
        """See `AsgiDeployment`."""
        return self._front

    async def Stream(self, request: bytes, grpc_context: Any) -> AsyncGenerator[Any, None]:
        """`serve_app.v1.ServeApp/Stream`. Serve calls the method that has the RPC's name."""
        async with aclosing(_with_status(self._servicer.stream(request, grpc_context), grpc_context)) as messages:
            async for message in messages:
                yield message

    async def stream_doc(self, request: bytes, grpc_context: Any) -> AsyncGenerator[Any, None]:
        """`jina.JinaSingleDocumentRequestRPC/stream_doc`."""
        async with aclosing(_with_status(self._servicer.stream_doc(request, grpc_context), grpc_context)) as messages:
            async for message in messages:
                yield message

    async def Check(self, request: bytes, grpc_context: Any) -> Any:
        """`grpc.health.v1.Health/Check`."""
        try:
            return await self._servicer.check(request, grpc_context)
        except Refusal as refusal:
            _set_status(refusal, grpc_context)
            raise

    async def _state(self) -> ModelCard | LoadStage:
        """The state of the model and of this replica's tokenizer together."""
        text, state = self._text_stage, await self._client.model()
        if text is None or (isinstance(state, LoadStage) and state.error):
            return state
        # If both load, report the one that has a fraction: it fetches the demo model, and the other waits for that.
        if isinstance(state, ModelCard) or text.error or (text.fraction is not None and state.fraction is None):
            return text
        return state

    async def _load_text(self, tried: asyncio.Event) -> None:
        """Load the tokenizer, make the application, and put it in the place of the loading application.

        Repeats that until it succeeds. `tried` is set after the first attempt, however it ended.
        """
        while self._text_stage is not None:
            try:
                self._front.app = await asyncio.to_thread(self._make_app)
                self._text_stage = None
            except Exception as error:
                expected = isinstance(error, ModelError)
                reason = str(error) if expected else f"the tokenizer can't be loaded: {type(error).__name__}: {error}"
                logger.error("%s", reason, exc_info=None if expected else error)
                self._text_stage = LoadStage("failed", error=reason)
            tried.set()
            if self._text_stage is not None:
                await asyncio.sleep(RETRY_S)

    def _make_app(self) -> ASGIApp:
        """On a thread: imports transformers, and may fetch the demo model, which the model server then finds."""
        from serve_app.chat.light_transformers import import_without_torch

        import_without_torch()
        from serve_app.api.app import create_app
        from serve_app.generation.service import CompletionService
        from serve_app.models.source import aliases

        report = Reporter(self._note)
        config = settled(self._config, self._board, self._app_name, self._model_deployment, report)
        formatter, defaults, self._grammars = _load_tokenizer(config, report)
        service = CompletionService(
            self._client,
            formatter,
            defaults,
            aliases=aliases(self._config.model),
            grammars=self._grammars,
            full=self._client.refusal,
        )
        streams = open_streams(self._client, self._config, self._app_name)
        responses = open_responses(self._client, self._config, self._app_name)
        quotas = Quotas(open_quotas(self._config, self._app_name), self._metrics)
        app = create_app(
            service,
            streams,
            self._config.api,
            self._metrics,
            pages=self._pages,
            responses=responses,
            keep_responses=self._config.responses.store,
            guard=self._guard,
            quotas=quotas,
            metrics_text=self._node_metrics.text,
        )
        self._streams, self._quotas = (streams, responses), quotas
        freeze()
        return app

    def _note(self, stage: LoadStage) -> None:
        self._text_stage = stage

    async def _announce(self) -> None:
        """Print the banner once the model can serve. If it can't, the model server logs why."""
        while True:
            state = await self._state()
            if isinstance(state, ModelCard):
                break
            await asyncio.sleep(POLL_S)
        try:
            url, grpc = await asyncio.to_thread(service_address, self._app_name)
        except Exception:  # Serve's private call may raise anything; the service runs without its banner
            logger.exception("the service's URL is not known")
            return
        if settings := missing():
            logger.warning(
                "streamed tokens cost up to three times the CPU time; start Ray with %s (see docs/operations.md)",
                " ".join(settings),
            )
        cache = cache_directory(self._config.cache_dir)
        access = Access(self._guard.keys.required, self._guard.warning)
        say(banner(state, url, log_folder(), cache, grpc=grpc, access=access))

    async def _report_metrics(self) -> None:
        while True:
            self._metrics.repeat(REQUESTS_IN_PROGRESS)
            self._client.report(self._metrics)
            # Checked each time: when the replica that reports stops, Serve gives its rank to another one.
            if self._streams and _speaks_for_all():
                try:
                    for streams, (number, size) in zip(self._streams, _KEPT, strict=True):
                        journals, size_bytes = await streams.journals()
                        self._metrics.gauge(number, journals)
                        self._metrics.gauge(size, size_bytes)
                except StoreUnavailable as error:  # `JournalWriter` logs a warning
                    logger.debug("the journals can't be counted: %s", error)
            await asyncio.sleep(METRICS_PERIOD_S)


class _Front:
    """The one ASGI application that Serve knows; `app` is what answers at the moment."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._addresses = ClientAddresses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on to `app`."""
        if scope["type"] == "http":
            self._addresses.correct(scope)
            receive, send = _with_disconnects(receive), _without_second_request_id(scope, send)
        await self.app(scope, receive, send)

    async def in_process(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request that comes from this process on to `app`."""
        await self.app(scope, receive, send)


async def _with_status(messages: AsyncGenerator[Any, None], context: Any) -> AsyncGenerator[Any, None]:
    """`messages`, whose `Refusal` becomes the status of the call."""
    async with aclosing(messages):
        try:
            async for message in messages:
                yield message
        except Refusal as refusal:
            _set_status(refusal, context)
            raise


def _set_status(refusal: Refusal, context: Any) -> None:
    """Serve takes the status of a call that raises from `context`, but not its metadata."""
    context.set_code(refusal.code)
    context.set_details(refusal.details)


def _load_tokenizer(config: AppConfig, report: Reporter) -> tuple[PromptFormatter, GenerationDefaults, GrammarChecker]:
    """The prompt formatter, the sampling parameters of requests that give none, and what checks grammars.

    Raises `ModelError`.
    """
    # Imported here: transformers takes seconds, and the replica should answer before that.
    from serve_app.chat.prompts import PromptFormatter
    from serve_app.chat.tokenizer import ChatTokenizer
    from serve_app.chat.tokenizer_error import TokenizerError
    from serve_app.models.defaults import read_generation_defaults
    from serve_app.models.source import resolve

    model, chat = config.model, config.chat
    files = resolve(model, cache_directory(config.cache_dir), tokenizer_only=True, progress=report)
    report(LoadStage("loading the tokenizer"))
    try:
        tokenizer = ChatTokenizer.load(
            files.tokenizer_folder, trust_remote_code=model.trust_remote_code, template=chat.template
        )
        formatter = PromptFormatter(tokenizer, chat)
    except TokenizerError as error:
        raise ModelError(str(error)) from error
    checker = GrammarChecker(files.tokenizer_folder, trust_remote_code=model.trust_remote_code)
    return formatter, read_generation_defaults(files.folder, files.tokenizer_folder, model.generation), checker


def _with_disconnects(receive: Receive) -> Receive:
    """`receive`, which reads from the proxy over Ray. Ray's error when client or proxy is gone becomes a disconnect."""

    async def receive_or_disconnect() -> Message:
        try:
            return await receive()
        except RayError:
            return {"type": "http.disconnect"}

    return receive_or_disconnect


def _guard(config: AuthConfig, host: str) -> Guard:
    """On a thread: reads the file of keys. Raises `KeyFileError`."""
    path = None if config.keys_file is None else expanded(config.keys_file)
    keys = ApiKeys(path, os.environ)
    if keys.required and not keys:
        logger.warning("nobody can use this service: it asks for API keys, and %s has none", path)
    guard = Guard(keys, bound_to=host, probe_secret=os.environ.get(PROBE_SECRET, ""))
    if guard.warning:
        logger.warning("%s", guard.warning)
    return guard


def _speaks_for_all() -> bool:
    """Whether this replica has rank 0, and so does what only one replica should do. Serve may reassign ranks."""
    return serve.get_replica_context().rank.rank == 0


def _without_second_request_id(scope: Scope, send: Send) -> Send:
    """Serve's proxy appends the request's X-Request-Id to every response; a client should see it once."""
    given = Headers(scope=scope).get("x-request-id")

    async def send_once(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("x-request-id") == given:
                del headers["x-request-id"]
        await send(message)

    return send_once
