"""The engine: one thread owns the device from the load checks on; asyncio callers put requests in and take ids out.

Every accepted request ends in a batch with a finish reason or in a Failure. A closed stream's work stops within one
step. Knows no Ray, no HTTP and no text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from serve_app.config import EngineConfig
from serve_app.core import (
    Failure,
    FailureCode,
    Fingerprint,
    FinishReason,
    GenerationRequest,
    LoadStage,
    Reply,
    TokenBatch,
)
from serve_app.engine.build import Backends, EngineCapacity, prepare, use_cpu_kernels
from serve_app.engine.kv_cache import PagePool
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.prompt_lookup import count_accepted
from serve_app.engine.replies import ReplyStream, deliver
from serve_app.engine.sampling import Sampled, Sampler
from serve_app.engine.scheduler import Chunk, Scheduler
from serve_app.engine.sequence import Sequence

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""An empty batch goes out when nothing else did for this long."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    alive: bool
    step_running_s: float
    """How long the step now on the device has been running; 0 between steps."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int
    waiting: int
    used_pages: int
    total_pages: int
    prompt_tokens: int
    """Prompt tokens computed or taken from the cache since the start; likewise the rest."""
    cached_prompt_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    drafted_tokens: int
    """Output tokens that were guessed and verified in a step; `accepted_tokens` of them were right."""
    accepted_tokens: int


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig,
        *,
        context_tokens: int,
        fingerprint: Fingerprint,
        dtype: torch.dtype | None = None,
        on_stage: Callable[[LoadStage], None] = lambda stage: None,
        before_isolated: Callable[[GenerationRequest], None] = lambda request: None,
        kernel_cache: Path | None = None,
        backends: Backends | None = None,
    ) -> None:
        """Choose and check the attention kernel, allocate the KV cache and start the thread that serves.

        Args:
            model: in eval mode on its device; its attention implementation is changed.
            config: the engine's settings.
            context_tokens: longest prompt plus output the model may serve.
            fingerprint: of the weights; requests for others are refused.
            dtype: float32 for a model on a CPU that is to compute so and holds its weights in 16 bits; else as it is.
            on_stage: told how far the construction is.
            before_isolated: told of a request, on the engine's thread, before each step that it has to itself.
            kernel_cache: folder for compiled CPU kernels, which are not used without one, and for what is known of
                kernels for GPUs.
            backends: attention kernels to try in this order instead of what `config.attention` says.

        Raises:
            EngineError: with one sentence that says what to do.
        """
        self._config = config
        self._fingerprint = fingerprint
        self._before_isolated = before_isolated
        self._streams: dict[Sequence, ReplyStream] = {}
        self._outbox: list[tuple[ReplyStream, Reply]] = []
        self._lock = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._pending = 0
        self._arrivals = 0
        self._stopping = self._ended = False
        self._error: str | None = None
        self._step_started: float | None = None
        self._prompt_tokens = self._cached_tokens = self._output_tokens = self._steps = 0
        self._drafted_tokens = self._accepted_tokens = 0
        built: Future[None] = Future()

        def build() -> tuple[ModelRunner, EngineCapacity]:
            on_stage(LoadStage("preparing the kernels"))
            kernels, notes = use_cpu_kernels(model, config, kernel_cache, dtype)
            self._sampler = Sampler(kernels)
            step_tokens = max(config.max_step_tokens, config.max_running)
            padded = config.batch_invariant and kernels is None
            runner = ModelRunner(model, (step_tokens, config.max_running) if padded else None)
            tried = None if kernel_cache is None else kernel_cache / "tried"
            capacity = prepare(runner, config, context_tokens, on_stage, kernels, backends, tried)
            return runner, dataclasses.replace(capacity, notes=(*notes, *capacity.notes))

        # Everything that computes runs on this one thread. GNU OpenMP keeps a pool for each thread that computes and
        # stops spinning when the pools together exceed the CPUs: a second pool made a decode step of the demo model
        # take 54 ms instead of 31 (2 cores). Callers keep to torch.set_num_threads(1) on their own threads.
        self._thread = threading.Thread(target=self._run, args=(build, built), name="engine", daemon=True)
        self._thread.start()
        built.result()

    # ---- any thread ----

    def stop(self) -> None:
        """Stop after the current step; what is unfinished gets a Failure. Safe to call twice."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    def health(self) -> EngineHealth:
        started = self._step_started
        running_s = 0.0 if started is None else time.monotonic() - started
        return EngineHealth(self._thread.is_alive() and self._error is None, running_s, self._error)

    def stats(self) -> EngineStats:
        with self._lock:
            held = self._pending + len(self._streams)
        running = len(self._scheduler.running)
        return EngineStats(
            running=running,
            # Not counted in the queue: one that is just let in, or sent back, is in neither list for a moment.
            waiting=max(0, held - running),
            used_pages=self._pool.used,
            total_pages=self._pool.num_pages,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        """Yield batches of new output ids as they are made, an empty one each second while there are none.

        Ends after a batch with a finish reason, or after a Failure. Closing it stops the work within one step.
        """
        if (answer := self._answer_at_once(request)) is not None:
            yield answer
            return
        deadline = None if request.remaining_s is None else time.monotonic() + request.remaining_s
        stream = ReplyStream(asyncio.get_running_loop())
        with self._lock:
            self._arrivals += 1
            sequence = Sequence(request, self._arrivals, deadline)
        delivered = len(request.output_token_ids)  # of the request: from here on the sequence is the engine's thread's
        if not self._command(lambda: self._submit(sequence, stream), pending=1):
            yield self._out_of_order()
            return
        try:
            while True:
                reply = await stream.take(HEARTBEAT_S)
                if reply is None:
                    yield TokenBatch(delivered)
                    continue
                if isinstance(reply, TokenBatch):
                    delivered += len(reply.token_ids)
                yield reply
                if isinstance(reply, Failure) or reply.finish_reason is not None:
                    return
        finally:
            self._command(lambda: self._forget(sequence))

    def _command(self, command: Callable[[], None], pending: int = 0) -> bool:
        """Have the engine's thread do something before its next step; False when it has ended."""
        with self._lock:
            if self._ended:
                return False
            self._pending += pending
            self._commands.append(command)
            self._lock.notify()
            return True

    def _gone(self) -> Failure:
        """Of a request that it had."""
        return Failure(FailureCode.REPLICA_LOST, self._error or "the replica is shutting down")

    def _out_of_order(self) -> Failure:
        """Of one that it never took: that can have done no harm."""
        return replace(self._gone(), code=FailureCode.NOT_READY)

    def _answer_at_once(self, request: GenerationRequest) -> Reply | None:
        """A refusal, or the end of a request that its earlier attempts had already finished."""
        if (failure := self._refusal(request)) is not None:
            return failure
        output = request.output_token_ids
        reason = request.finish_reason(len(output), output[-1] if output else None)
        return None if reason is None else TokenBatch(len(output), finish_reason=reason)

    def _refusal(self, request: GenerationRequest) -> Failure | None:
        if request.fingerprint != self._fingerprint:
            return Failure(FailureCode.WRONG_WEIGHTS, "the model was replaced by another: repeat the request")
        if self._error is not None or self._stopping:
            return self._out_of_order()
        limit, tokens = self.capacity.context_tokens, len(request.prompt_token_ids)
        if not tokens:
            return Failure(FailureCode.INVALID_REQUEST, "the prompt is empty")
        if tokens + request.max_new_tokens > limit:
            return Failure(
                FailureCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt's {tokens} tokens and {request.max_new_tokens} new ones are more than the {limit} tokens "
                "that this replica can hold for one request",
            )
        if (request.sampling.logprobs or 0) > self._runner.vocab_size:
            return Failure(
                FailureCode.INVALID_REQUEST, f"more logprobs than the vocabulary's {self._runner.vocab_size} tokens"
            )
        given = (*request.prompt_token_ids, *request.output_token_ids)
        bias = tuple(token for token, _ in request.sampling.logit_bias)
        for token in (*given, *bias, *request.stop_token_ids):
            if not 0 <= token < self._runner.vocab_size:
                return Failure(
                    FailureCode.INVALID_REQUEST,
                    f"token id {token} is outside the vocabulary of {self._runner.vocab_size}",
                )
        stats = self.stats()
        if stats.running + stats.waiting >= self._config.max_running + self._config.max_waiting:
            return Failure(FailureCode.OVERLOADED, "the model's queue is full; try again later", retry_after_s=1.0)
        return None

    # ---- the engine's thread ----

    def _run(
        self,
        build: Callable[[], tuple[ModelRunner, EngineCapacity]],
        built: Future[None],
    ) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        with torch.inference_mode():
            try:
                self._runner, self.capacity = build()
            except BaseException as error:  # noqa: BLE001 - the constructor raises it
                built.set_exception(error)
                return
            pages = self.capacity.kv_capacity_tokens // self.capacity.page_tokens
            self._pool = PagePool(pages, in_runs=self.capacity.reads_runs)
            self._scheduler = Scheduler(
                self._pool,
                page_tokens=self.capacity.page_tokens,
                max_running=self._config.max_running,
                max_step_tokens=self._config.max_step_tokens,
                prompt_lookup=self._config.prompt_lookup,
                row_cost=self.capacity.row_cost,
            )
            built.set_result(None)
            self._serve()

    def _serve(self) -> None:
        try:
            while self._obey():
                self._step()
        except Exception as error:
            # Whatever it was, this process can't be trusted with a device any more: streams continue elsewhere.
            logger.exception("the engine failed in step %d", self._steps)
            self._error = (
                f"the engine failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        with self._lock:
            self._ended = True
            commands = list(self._commands)
        for command in commands:
            command()
        self._publish([(sequence, self._gone()) for sequence in self._streams])
        for sequence in list(self._streams):
            self._forget(sequence)
        self._step_started = None

    def _obey(self) -> bool:
        """Do what callers asked for, wait while there is nothing to do; False when it is time to stop."""
        with self._lock:
            while not (self._commands or self._scheduler.running or self._scheduler.waiting or self._stopping):
                if self._outbox:
                    self._send()  # it may find streams to forget
                else:
                    self._lock.wait()
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        return not self._stopping

    def _submit(self, sequence: Sequence, stream: ReplyStream) -> None:
        with self._lock:
            self._pending -= 1
            self._streams[sequence] = stream
        self._scheduler.add(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if self._streams.pop(sequence, None) is not None:
            self._scheduler.remove(sequence)

    def _step(self) -> None:
        self._expire()
        chunks = self._scheduler.schedule()
        if not self._runner.replays(chunks):
            self._send()
        if not chunks:
            return
        if chunks[0].sequence.isolated:
            self._before_isolated(chunks[0].sequence.request)
        self._step_started = now = time.monotonic()
        for chunk in chunks:
            if chunk.sequence.started_at is None:
                self._start(chunk.sequence, now)
        logits = self._runner.step(chunks)
        # The last step's tokens go out while the device computes: callers' threads are in nobody's way now. Where the
        # device is this thread, or launching takes long, they have gone before.
        self._send()
        ready = [chunk for chunk in chunks if chunk.completes]
        sampled = self._sampler.sample(logits, [row for chunk in ready for row in chunk.rows()]) if ready else []
        self._finish_step(chunks, ready, sampled)
        self._steps += 1
        self._step_started = None

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.started_at = now
        self._prompt_tokens += sequence.prompt_len
        self._cached_tokens += sequence.cached_prompt_tokens

    def _finish_step(self, chunks: list[Chunk], ready: list[Chunk], sampled: list[Sampled]) -> None:
        rows = iter(sampled)
        choices = {chunk.sequence: list(islice(rows, 1 + len(chunk.draft))) for chunk in ready}
        for chunk in chunks:
            if chunk.draft and any(choice.token_id < 0 for choice in choices[chunk.sequence]):
                # A guess that the sequence would never have made may be to blame: compute its token again without.
                del choices[chunk.sequence]
                self._scheduler.discard_draft(chunk)
            else:
                self._scheduler.mark_computed(chunk)
        now = time.monotonic()
        replies = [(c.sequence, self._advance(c, choices[c.sequence], now)) for c in ready if c.sequence in choices]
        self._publish(replies, send=self._runner.graphs is None)
        for sequence, reply in replies:
            if isinstance(reply, Failure) or reply.finish_reason is not None:
                self._forget(sequence)

    def _advance(self, chunk: Chunk, sampled: list[Sampled], now: float) -> Reply:
        """Append what was sampled for a chunk's rows, as far as its guesses were right and nothing ends the output."""
        if sampled[0].token_id < 0:
            return Failure(FailureCode.ENGINE_FAILED, "the model's output is not a number; the request can't be served")
        sequence, index = chunk.sequence, chunk.sequence.output_len
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        right = count_accepted(chunk.draft, [choice.token_id for choice in sampled])
        kept: list[Sampled] = []
        reason: FinishReason | None = None
        while reason is None and len(kept) <= right:
            kept.append(sampled[len(kept)])
            reason = sequence.append(kept[-1].token_id)
        if chunk.draft:
            right = min(right, len(kept))
            self._scheduler.accept_draft(sequence, right)
            self._drafted_tokens += len(chunk.draft)
            self._accepted_tokens += right
        self._output_tokens += len(kept)
        ids = tuple(choice.token_id for choice in kept)
        logprobs = tuple(choice.logprobs for choice in kept if choice.logprobs is not None) or None
        stats = None
        if reason is not None or index == len(sequence.request.output_token_ids):
            stats = replace(sequence.stats(now), numerics_id=self.capacity.numerics_id)
        return TokenBatch(index, ids, logprobs, reason, stats)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [s for s in self._streams if s.deadline is not None and s.deadline <= now]
        self._publish([(s, Failure(FailureCode.DEADLINE_EXCEEDED, "the request's time is over")) for s in late])
        for sequence in late:
            self._forget(sequence)

    def _publish(self, replies: SequenceOf[tuple[Sequence, Reply]], send: bool = True) -> None:
        """Address these to their callers; unless told otherwise, they go out at once."""
        self._outbox.extend((self._streams[sequence], reply) for sequence, reply in replies)
        if send:
            self._send()

    def _send(self) -> None:
        closed, self._outbox = deliver(self._outbox), []
        for sequence in [s for s, stream in self._streams.items() if stream.loop in closed]:
            logger.warning("a stream was dropped with its event loop")
            self._command(lambda sequence=sequence: self._forget(sequence))  # type: ignore[misc]
