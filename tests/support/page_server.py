"""The whole HTTP application over a scripted replica, on 127.0.0.1, in a thread: for browsers and other programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fake_replica import FakeReplica, Step, card
from memory_metrics import MemoryMetrics

from serve_app.api.app import create_app
from serve_app.api.http.guard import Guard
from serve_app.api.http.pages import Pages
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
from serve_app.generation.replica import ReplicaLost
from serve_app.generation.service import CompletionService
from serve_app.grammar_checker import GrammarChecker
from serve_app.resume.context import ResumeSettings
from serve_app.resume.journal_store import JournalLimits
from serve_app.resume.memory_store import MemoryJournalStore
from serve_app.resume.registry import ResumableStreams


@dataclass
class Model:
    """What the replica says, and how."""

    tokenizer: ChatTokenizer
    text: str = "The quick brown fox."
    pause_s: float = 0.0
    """Between tokens."""
    dies_after: int | None = None
    """Tokens after which the first attempt ends, as if its replica had been killed."""
    failure: Step = None
    """What a request gets in place of an answer."""
    requests: list[GenerationRequest] = field(default_factory=list)

    def script(self, request: GenerationRequest) -> list[Step]:
        """One attempt."""
        self.requests.append(request)
        if self.failure is not None:
            return [self.failure]
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        text = self.tokenizer.encode_text(self.text, add_bos=False, parse_special=False)
        ids = [*text, eos][: request.max_new_tokens]
        steps: list[Step] = []
        for index in range(len(request.output_token_ids), len(ids)):
            if self.dies_after is not None and index >= self.dies_after:
                self.dies_after = None
                return [*steps, ReplicaLost("it was killed", taken=True)]
            last = index == len(ids) - 1
            reason = (FinishReason.STOP if ids[index] == eos else FinishReason.LENGTH) if last else None
            logprobs = None
            if (top := request.sampling.logprobs) is not None:
                others = tuple((ids[index] + rank, -0.1 - index % 4 - rank) for rank in range(top))
                logprobs = (TokenLogprobs(-0.1 - index % 4, others),)
            if self.pause_s:
                steps.append(self.pause_s)
            ends = last or index == len(request.output_token_ids)
            stats = GenerationStats(cached_prompt_tokens=0) if ends else None
            steps.append(TokenBatch(index, (ids[index],), logprobs, reason, stats))
        return steps


@dataclass
class PageServer:
    """A running server."""

    url: str
    model: Model
    replica: FakeReplica
    cut: Callable[[], None]
    """Breaks every connection, as a proxy that is replaced does."""


@contextmanager
def page_server(
    tokenizer: ChatTokenizer, tokenizer_folder: Path, guard: Guard | None = None, **config: Any
) -> Iterator[PageServer]:
    """Serves until the block ends."""
    model = Model(tokenizer)
    state = card(vocab_size=tokenizer.vocab_size, context_tokens=32_768, kv_capacity_tokens=65_536)
    replica = FakeReplica([model.script], state=state)
    started = threading.Event()
    ends: list[Callable[[], None]] = []
    served: list[uvicorn.Server] = []

    async def serve() -> None:
        failover = FailoverSettings(silence_s=60, max_attempts=3, first_backoff_s=0.05, max_backoff_s=0.1)
        grammars = GrammarChecker(tokenizer_folder)
        defaults = GenerationDefaults(eos_token_ids=(tokenizer.eos_token_id or 0,))
        service = CompletionService(
            replica,
            PromptFormatter(tokenizer, ChatConfig()),
            defaults,
            failover,
            frozenset(),
            grammars,
            lambda tenant, weight, remaining_s: None,
        )
        settings = ResumeSettings(lease_s=0.2, tick_s=0.01, settle_s=0.5, gone_s=0.1)
        streams, responses = (
            ResumableStreams(replica, MemoryJournalStore(JournalLimits(lease_s=60)), settings, failover)
            for _ in range(2)
        )
        api = ApiConfig.model_validate(config)
        app = create_app(
            service, streams, api, MemoryMetrics(), Pages(api, "127.0.0.1"), responses=responses, guard=guard
        )
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
        served.append(server)
        loop = asyncio.get_running_loop()

        def end() -> None:
            server.should_exit = server.force_exit = True

        ends.append(lambda: loop.call_soon_threadsafe(end))
        running = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.01)
        started.set()
        await running
        await streams.aclose()
        await responses.aclose()
        await grammars.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        (socket,) = served[0].servers[0].sockets
        loop = served[0].servers[0].get_loop()

        def cut() -> None:
            def break_all() -> None:
                for connection in list(served[0].server_state.connections):
                    connection.transport.abort()

            loop.call_soon_threadsafe(break_all)

        yield PageServer(f"http://127.0.0.1:{socket.getsockname()[1]}", model, replica, cut)
    finally:
        for end in ends:
            end()
        thread.join(30)
