"""The whole HTTP application over a scripted replica and a real tokenizer that is trained here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn
from fake_replica import FakeReplica, Script, Step, card, prompt_scores
from memory_metrics import MemoryMetrics
from starlette.applications import Starlette
from unlogged_stream_ids import unlogged_stream_ids

from serve_app.access.reservations import Quotas
from serve_app.api.app import create_app
from serve_app.api.http.guard import Guard
from serve_app.api.http.pages import Pages
from serve_app.api.http.probes import MetricsText, no_metrics
from serve_app.api.http.sse import StreamSettings
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ApiConfig, ChatConfig
from serve_app.core import (
    FinishReason,
    GenerationDefaults,
    GenerationRequest,
    GenerationStats,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.service import CompletionService, IsFull
from serve_app.grammar_checker import GrammarChecker
from serve_app.resume.context import ResumeSettings
from serve_app.resume.journal_store import JournalLimits, JournalStore
from serve_app.resume.memory_store import MemoryJournalStore
from serve_app.resume.registry import ResumableStreams

ANSWER = "The quick brown fox says 🙂 and naïve."


@pytest.fixture(autouse=True)
def no_stream_id_is_logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In no test, whatever goes wrong in it."""
    with unlogged_stream_ids(monkeypatch):
        yield


@pytest.fixture(scope="session")
def eos(tokenizer: ChatTokenizer) -> int:
    assert tokenizer.eos_token_id is not None
    return tokenizer.eos_token_id


Writes = Callable[..., Script]


@pytest.fixture(scope="session")
def writes(tokenizer: ChatTokenizer, eos: int) -> Writes:
    """A model that answers a text: writes("Hi", batch=2, pause_s=0.01, end=...). It ends with EOS, or with `end`."""

    def make(
        text: str = ANSWER, *, batch: int = 1, pause_s: float | None = None, end: Step | str = "eos", cached: int = 2
    ) -> Script:
        def script(request: GenerationRequest) -> list[Step]:
            ids = tokenizer.encode_text(text, add_bos=False, parse_special=False)
            ids = [*ids, eos] if end == "eos" else ids
            ids = ids[: request.max_new_tokens]
            of_prompt = prompt_scores(request) if request.needs_prompt_logprobs else None
            if not request.max_new_tokens:
                return [TokenBatch(0, (), None, FinishReason.LENGTH, GenerationStats(), of_prompt)]
            steps: list[Step] = []
            for first in range(len(request.output_token_ids), len(ids), batch):
                some = tuple(ids[first : first + batch])
                last = first + batch >= len(ids) and end == "eos"
                reason = (FinishReason.STOP if some[-1] == eos else FinishReason.LENGTH) if last else None
                logprobs = None
                if (top := request.sampling.logprobs) is not None:
                    pairs = [tuple((id_ + k, -0.25 - k) for k in range(top)) for id_ in some]
                    logprobs = tuple(TokenLogprobs(-0.25, pair) for pair in pairs)
                if pause_s is not None:
                    steps.append(pause_s)
                first_of_attempt = first == len(request.output_token_ids)
                stats = GenerationStats(cached_prompt_tokens=cached) if last or first_of_attempt else None
                steps.append(TokenBatch(first, some, logprobs, reason, stats, None if first else of_prompt))
            return steps if end == "eos" else [*steps, end]

        return script

    return make


@pytest.fixture
def metrics() -> MemoryMetrics:
    return MemoryMetrics()


MakeApp = Callable[..., Starlette]


@pytest.fixture
async def make_app(
    tokenizer: ChatTokenizer, tokenizer_folder: Path, eos: int, metrics: MemoryMetrics
) -> AsyncIterator[MakeApp]:
    """make_app(replica, stream={...}, defaults={...}, journals=store, bound_to=..., **fields of ApiConfig)."""
    made: list[ResumableStreams] = []
    grammars = GrammarChecker(tokenizer_folder)  # costs nothing until an answer is constrained

    def make(
        replica: FakeReplica,
        *,
        stream: dict[str, float] | None = None,
        defaults: dict[str, object] | None = None,
        failover: FailoverSettings | None = None,
        journals: JournalStore | None = None,
        kept: JournalStore | None = None,
        keep_responses: bool = True,
        background: ResumeSettings | None = None,
        resume: ResumeSettings | None = None,
        bound_to: str | None = None,
        quotas: Quotas | None = None,
        aliases: frozenset[str] = frozenset(),
        text: ChatTokenizer = tokenizer,
        guard: Guard | None = None,
        full: IsFull = lambda tenant, weight, remaining_s: None,
        metrics_text: MetricsText = no_metrics,
        **config: object,
    ) -> Starlette:
        failover = failover or FailoverSettings(silence_s=60, max_attempts=3, first_backoff_s=0.001, max_backoff_s=0.01)
        service = CompletionService(
            replica,
            PromptFormatter(text, ChatConfig()),
            GenerationDefaults(**{"eos_token_ids": (eos,), **(defaults or {})}),  # type: ignore[arg-type]
            failover,
            aliases,
            grammars,
            full,
        )
        streams = ResumableStreams(
            replica,
            journals or MemoryJournalStore(JournalLimits(lease_s=60)),
            resume or ResumeSettings(lease_s=0.2, tick_s=0.01, settle_s=0.5, gone_s=0.1),
            failover,
        )
        responses = ResumableStreams(
            replica,
            kept or MemoryJournalStore(JournalLimits(lease_s=60)),
            background or ResumeSettings(grace_s=0.0, lease_s=0.2, tick_s=0.01, settle_s=0.5, gone_s=0.1),
            failover,
        )
        made.extend((streams, responses))
        api_config = ApiConfig.model_validate(config)
        settings = None
        if stream is not None:
            settings = StreamSettings(**{"slow_reader_bytes": api_config.slow_reader_bytes, **stream})  # type: ignore[arg-type]
        app = create_app(
            service,
            streams,
            api_config,
            metrics,
            Pages(api_config, bound_to),
            settings,
            responses=responses,
            keep_responses=keep_responses,
            guard=guard,
            quotas=quotas,
            metrics_text=metrics_text,
        )
        app.state.responses = responses  # for tests in which an ingress dies
        return app

    yield make
    for streams in made:
        await streams.aclose()
    await grammars.aclose()


@pytest.fixture
def replica(writes: Writes, tokenizer: ChatTokenizer) -> FakeReplica:
    """Answers ANSWER."""
    return FakeReplica([writes()], state=card(vocab_size=tokenizer.vocab_size))


Http = Callable[[Starlette], httpx.AsyncClient]


@pytest.fixture
async def http() -> AsyncIterator[Http]:
    """A client of an application in this process."""
    async with AsyncExitStack() as clients:

        def make(app: Starlette) -> httpx.AsyncClient:
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=10)
            clients.push_async_callback(client.aclose)
            return client

        yield make


@pytest.fixture
async def api(replica: FakeReplica, make_app: MakeApp, http: Http) -> httpx.AsyncClient:
    """A client of the application over `replica`."""
    return http(make_app(replica))


Serve = Callable[[Starlette], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """serve(app) -> its URL on 127.0.0.1, by uvicorn in this loop."""
    async with AsyncExitStack() as servers:

        async def start(app: Starlette) -> str:
            server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
            running = asyncio.create_task(server.serve())

            async def stop() -> None:
                server.should_exit = server.force_exit = True
                await running

            servers.push_async_callback(stop)
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.01)
            (socket,) = server.servers[0].sockets
            return f"http://127.0.0.1:{socket.getsockname()[1]}"

        yield start
