"""The serving engine: asyncio callers put requests in and take ids out; one thread owns the device.

Every accepted request ends in a batch with a finish reason or in a Failure. A closed stream's work stops within one
step. Knows no Ray, no HTTP and no text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from serve_app.config import EngineConfig
from serve_app.core import (
    Failure,
    FailureCode,
    Fingerprint,
    FinishReason,
    GenerationRequest,
    LoadStage,
    ReplicaLoad,
    Reply,
    TokenBatch,
)
from serve_app.engine.build import EngineCapacity, build_core
from serve_app.engine.constraint import Constraint
from serve_app.engine.core import EngineCore, Gain, StepCounters, deadline_exceeded, ends
from serve_app.engine.grammars import Grammars
from serve_app.engine.load import is_news
from serve_app.engine.refusal import refusal
from serve_app.engine.replies import ReplyStream, deliver
from serve_app.engine.sequence import Sequence
from serve_app.grammar import GrammarError, Vocabulary, VocabularyError

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
    preemptions: int
    """Since the start."""
    counters: StepCounters


class Engine:
    """The thread that steps an `EngineCore`, the commands that callers give it, and their streams."""

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
        vocabulary: Future[Vocabulary] | None = None,
    ) -> None:
        """Choose and check the attention kernel, allocate the KV cache and start the thread that serves.

        Args:
            model: in eval mode on its device; its attention implementation is changed.
            config: the engine's settings.
            context_tokens: longest prompt plus output the model may serve.
            fingerprint: names the loaded weights; requests for other weights are refused.
            dtype: float32 makes a model on a CPU with 16-bit weights compute in float32. Other values change nothing.
            on_stage: called with each stage of the construction, on the engine's thread.
            before_isolated: called with an isolated request, on the engine's thread, before each step of its own.
            kernel_cache: folder for compiled CPU kernels and for the outcomes of GPU kernel trials. Without it our CPU
                kernels are not used.
            vocabulary: what grammars are compiled for; it may be loading still. Without it requests with a grammar are
                refused.

        Raises:
            EngineError: the engine can't be built; the message is one sentence that says what to do.
        """
        self._config = config
        self._fingerprint = fingerprint
        self._grammars = Grammars(vocabulary)
        self._streams: dict[Sequence, ReplyStream] = {}
        self._outbox: list[tuple[ReplyStream, Reply]] = []
        self._load: ReplicaLoad | None = None
        """After the last step."""
        self._told_load: ReplicaLoad | None = None
        self._watcher: tuple[asyncio.AbstractEventLoop, Callable[[ReplicaLoad], None]] | None = None
        self._lock = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._pending = 0
        """Submitted requests that the engine's thread has not taken over yet."""
        self._arrivals = 0
        self._stopping = self._ended = False
        self._error: str | None = None
        built: Future[None] = Future()
        build = partial(
            build_core,
            model,
            config,
            context_tokens=context_tokens,
            dtype=dtype,
            on_stage=on_stage,
            before_isolated=before_isolated,
            kernel_cache=kernel_cache,
        )
        # Everything that computes runs on this one thread. GNU OpenMP keeps a pool for each thread that computes and
        # stops spinning when the pools together exceed the CPUs: a second pool made a decode step of the demo model
        # take 54 ms instead of 31 (2 cores). Callers keep to torch.set_num_threads(1) on their own threads.
        self._thread = threading.Thread(target=self._run, args=(build, built), name="engine", daemon=True)
        self._thread.start()
        built.result()

    # ---- any thread ----

    def stop(self) -> None:
        """Stop after the current step; unfinished requests get a Failure. Safe to call twice."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    def health(self) -> EngineHealth:
        started = self._core.step_started
        running_s = 0.0 if started is None else time.monotonic() - started
        return EngineHealth(self._thread.is_alive() and self._error is None, running_s, self._error)

    def stats(self) -> EngineStats:
        with self._lock:
            unfinished = self._pending + len(self._streams)
        scheduler = self._core.scheduler
        running = len(scheduler.running)
        return EngineStats(
            running=running,
            # The scheduler's own queue would miss a sequence that is being admitted or preempted at this moment.
            waiting=max(0, unfinished - running),
            used_pages=scheduler.pool.used,
            total_pages=scheduler.pool.num_pages,
            preemptions=scheduler.preemptions,
            counters=copy(self._core.counters),
        )

    def watch_load(self, tell: Callable[[ReplicaLoad], None]) -> None:
        """Have `tell` called in this event loop with the engine's load: soon, and then after each step that changes it.

        It is called before the loop gets the replies of that step. A second call replaces `tell`.
        """
        loop = asyncio.get_running_loop()

        def watch() -> None:
            self._watcher, self._told_load = (loop, tell), None

        self._command(watch)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        """Yield batches of new output ids as they are made, an empty one each second while there are none.

        Ends after a batch with a finish reason, or after a Failure. Closing it stops the work within one step.
        """
        if (failure := self._refusal(request)) is not None:
            yield failure
            return
        deadline = None if request.remaining_s is None else time.monotonic() + request.remaining_s
        constraint: Constraint | None = None
        if request.constraint:
            async with aclosing(self._constrain(request, deadline)) as steps:
                async for step in steps:
                    if isinstance(step, Constraint):
                        constraint = step
                    else:
                        yield step
            if constraint is None:
                return
        if (answer := _answer_at_once(request, constraint)) is not None:
            yield answer
            return
        stream = ReplyStream(asyncio.get_running_loop())
        with self._lock:
            self._arrivals += 1
            sequence = Sequence(request, self._arrivals, deadline, constraint=constraint)
        # Read before the submission: afterwards only the engine's thread may touch the sequence.
        delivered = len(request.output_token_ids)
        if not self._command(lambda: self._submit(sequence, stream), pending=1):
            yield self._lost(FailureCode.NOT_READY)
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
                if ends(reply):
                    return
        finally:
            self._command(lambda: self._cancel(sequence))

    def _command(self, command: Callable[[], None], pending: int = 0) -> bool:
        """Queue a command for the engine's thread, before its next step; False when that thread has ended."""
        with self._lock:
            if self._ended:
                return False
            self._pending += pending
            self._commands.append(command)
            self._lock.notify()
            return True

    def _lost(self, code: FailureCode) -> Failure:
        """A Failure of an engine that no longer serves. Pass `NOT_READY` for a request that it has never computed."""
        return Failure(code, self._error or "the replica is shutting down")

    async def _constrain(
        self, request: GenerationRequest, deadline: float | None
    ) -> AsyncGenerator[Reply | Constraint, None]:
        """The request's constraint, after an empty batch for each second that this takes; or a Failure instead.

        The request counts as waiting meanwhile.
        """
        with self._lock:
            self._pending += 1
        making = asyncio.ensure_future(self._grammars.constraint(request))
        try:
            while True:
                rest = HEARTBEAT_S if deadline is None else min(HEARTBEAT_S, deadline - time.monotonic())
                if (await asyncio.wait({making}, timeout=max(0.0, rest)))[0]:
                    yield making.result()
                    return
                if self._ended:
                    yield self._lost(FailureCode.NOT_READY)
                    return
                if deadline is not None and deadline <= time.monotonic():
                    yield deadline_exceeded()
                    return
                yield TokenBatch(len(request.output_token_ids))
        except (GrammarError, VocabularyError) as error:
            yield Failure(FailureCode.INVALID_REQUEST, str(error))
        finally:
            making.cancel()
            with self._lock:
                self._pending -= 1

    def _refusal(self, request: GenerationRequest) -> Failure | None:
        if request.fingerprint != self._fingerprint:
            return Failure(FailureCode.WRONG_WEIGHTS, "the model was replaced; repeat the request")
        if self._error is not None or self._stopping:
            return self._lost(FailureCode.NOT_READY)
        limit, vocab_size = self.capacity.context_tokens, self._core.runner.vocab_size
        if (failure := refusal(request, context_tokens=limit, vocab_size=vocab_size)) is not None:
            return failure
        stats = self.stats()
        if stats.running + stats.waiting >= self._config.max_running + self._config.max_waiting:
            message = "the model's queue is full; try again later"
            return Failure(FailureCode.OVERLOADED, message, retry_after_s=self._core.retry_after_s())
        return None

    # ---- the engine's thread ----

    def _run(self, build: Callable[[], tuple[EngineCore, EngineCapacity]], built: Future[None]) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        with torch.inference_mode():
            try:
                self._core, self.capacity = build()
            except BaseException as error:  # noqa: BLE001 - the constructor raises it
                built.set_exception(error)
                return
            built.set_result(None)
            self._serve()

    def _serve(self) -> None:
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            # After any exception the state of the device is unknown: the engine ends. Callers retry on other replicas.
            logger.exception("the engine failed in step %d", self._core.counters.steps)
            message = str(error).splitlines()[0] if str(error) else ""
            self._error = f"the engine failed: {type(error).__name__}: {message}"
        with self._lock:
            self._ended = True
            commands = list(self._commands)
        for command in commands:
            command()
        unfinished = list(self._streams)
        self._publish([(sequence, self._lost(FailureCode.REPLICA_LOST)) for sequence in unfinished])
        for sequence in unfinished:
            self._core.remove(sequence)
        self._core.step_started = None

    def _obey(self) -> bool:
        """Run the callers' commands, after waiting for one if there is no work; False when it is time to stop."""
        with self._lock:
            while not (self._commands or self._core.has_work or self._stopping):
                if self._outbox:
                    self._send()  # it may add commands
                else:
                    self._lock.wait()
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        if not self._core.has_work:  # no step will tell it
            self._load = self._core.load()
            self._send()
        return not self._stopping

    def _submit(self, sequence: Sequence, stream: ReplyStream) -> None:
        with self._lock:
            self._pending -= 1
            self._streams[sequence] = stream
        self._core.scheduler.add(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        if self._streams.pop(sequence, None) is not None:
            self._core.remove(sequence)

    def _step(self) -> None:
        self._publish(self._core.expire())
        gains = self._core.step(meanwhile=self._send)
        self._load = self._core.load()
        # With CUDA graphs, replies are sent during the next step: callers' threads then run while the device computes,
        # and delay no launch.
        self._publish(gains, send=self._core.runner.graphs is None)

    def _publish(self, gains: SequenceOf[Gain], send: bool = True) -> None:
        """Put the replies into the outbox, and send the whole outbox unless `send` is false."""
        for sequence, reply in gains:
            stream = self._streams.pop(sequence) if ends(reply) else self._streams[sequence]
            self._outbox.append((stream, reply))
        if send:
            self._send()

    def _send(self) -> None:
        self._tell_load()
        closed, self._outbox = deliver(self._outbox), []
        for sequence in [s for s, stream in self._streams.items() if stream.loop in closed]:
            logger.warning("a stream was dropped because its event loop was closed")
            self._command(lambda sequence=sequence: self._cancel(sequence))  # type: ignore[misc]

    def _tell_load(self) -> None:
        if self._watcher is None or self._load is None or not is_news(self._load, self._told_load):
            return
        loop, tell = self._watcher
        try:
            loop.call_soon_threadsafe(tell, self._load)
        except RuntimeError:  # the loop is closed
            self._watcher = None
        self._told_load = self._load


def _answer_at_once(request: GenerationRequest, constraint: Constraint | None) -> TokenBatch | None:
    """The last batch of a request whose output earlier attempts had already completed; else None."""
    if request.needs_prompt_logprobs:
        return None
    output = request.output_token_ids
    reason = request.finish_reason(len(output), output[-1] if output else None)
    if reason is not FinishReason.STOP and constraint is not None and constraint.complete:
        reason = FinishReason.STOP
    return None if reason is None else TokenBatch(len(output), finish_reason=reason)
