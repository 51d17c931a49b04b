"""One choice over one or more attempts on model replicas (P2).

Promises the tokens of one uninterrupted attempt, whichever replicas die, and that closing a generation cancels its
work at once (P5). Pure asyncio over a `ReplicaClient`: knows no transport, no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, closing
from typing import Self

from msgspec.structs import replace

from serve_app.backoff import backoff_s
from serve_app.core import Failure, FailureCode, GenerationRequest, GenerationStats, Reply, TokenBatch
from serve_app.generation.attempt_history import AttemptHistory, FailoverSettings
from serve_app.generation.output_tokens import BatchError, OutputTokens
from serve_app.generation.replica import ReplicaClient, ReplicaLost, Waiting
from serve_app.idle_timeout import IdleTimeout

logger = logging.getLogger(__name__)


class Generation:
    """One choice. Use it as an async context manager: entering starts it, leaving cancels what still runs.

    It reads its replica in a task of its own, as fast as replies come: when a replica dies, Serve drops what was
    delivered but not read. `take` hands out the new tokens. A late reader gets fewer and larger batches, so never more
    than `max_new_tokens` ids wait for it.
    """

    def __init__(
        self,
        client: ReplicaClient,
        request: GenerationRequest,
        changed: asyncio.Event,
        settings: FailoverSettings | None = None,
        prior: TokenBatch | None = None,
    ) -> None:
        """`request` has no `output_token_ids`; its `remaining_s` counts from entering.

        `changed` is set whenever `take` may have something to give. `prior`: all output that an earlier, accepted
        generation of the same request delivered, with the stats of its first tokens; this generation continues it.
        """
        self._client = client
        self._request = request
        self._changed = changed
        self._settings = settings or FailoverSettings()
        self._output = OutputTokens(request)
        self._taken = 0
        self._deadline: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._accepted = self._announced = False
        self._stats_taken = False
        self._latest_stats: GenerationStats | None = None
        """Stats of the latest attempt that sent some."""
        self._failure: Failure | None = None
        self.ended = False
        """`take` has handed out the last reply, or the generation was closed."""
        self.recoveries_s: list[float] = []
        """For each time that its replica was lost in the middle of the answer: seconds until the next token came."""
        self._lost_at: float | None = None
        if prior is not None:
            self._output.append(prior)
            self._taken = len(self._output)
            self._accepted = self._announced = True
            self._stats_taken = prior.stats is not None
            if prior.stats is not None:
                self._request = replace(request, numerics_id=prior.stats.numerics_id)

    async def __aenter__(self) -> Generation:
        if self._request.remaining_s is not None:
            self._deadline = asyncio.get_running_loop().time() + self._request.remaining_s
        self._task = asyncio.create_task(self._read(), name=f"generation {self._request.request_id}")
        self._task.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the attempt and wait until its generator is closed. Nothing is handed out afterwards."""
        self.ended = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def take(self) -> Reply | None:
        """What has come since the last call, or None.

        The first batch may be empty: it says that a replica has accepted the request. The last reply is a batch with
        a `finish_reason` or a `Failure`. `stats` come once, with the first tokens, from the first attempt that
        delivered tokens: a later attempt's cache hits save the caller nothing. Raises any exception of the client that
        `ReplicaClient.open` does not allow.
        """
        if self.ended:
            return None
        if self._has_news or (self._accepted and not self._announced):
            return self._new_batch()
        if self._failure is not None:
            self.ended = True
            return self._failure
        if self._task is not None and self._task.done():
            self.ended = True
            self._task.result()
        return None

    @property
    def _has_news(self) -> bool:
        return len(self._output) > self._taken or self._output.finish_reason is not None

    def _new_batch(self) -> TokenBatch:
        batch = self._output.tokens(self._taken)
        self._taken = len(self._output)
        self._announced = True
        self.ended = self._output.finish_reason is not None
        stats = None if self._stats_taken else self._output.stats
        self._stats_taken = self._output.stats is not None
        if not self.ended and self._task is not None and self._task.done():
            self._changed.set()  # the failure is next, and nothing else will wake the reader
        return replace(batch, finish_reason=self._output.finish_reason, stats=stats)

    async def _read(self) -> None:
        """The task: attempts until the choice has ended, within the deadline."""
        try:
            async with asyncio.timeout_at(self._deadline) as deadline:
                await self._run_attempts()
        except TimeoutError:
            if not deadline.expired():
                raise
            message = f"The request did not finish within its time limit of {self._request.remaining_s:g} s."
            self._failure = Failure(FailureCode.DEADLINE_EXCEEDED, message)

    async def _run_attempts(self) -> None:
        settings = self._settings
        history = AttemptHistory(settings)
        while not self._output.complete():  # complete if only the batch with the finish reason was lost
            known = len(self._output)
            reason = await self._attempt_noted(history)
            if reason is None and history.attempts:
                self._log_continued()
            if reason is None or self._failure is not None:
                return
            if len(self._output) and self._lost_at is None:
                self._lost_at = asyncio.get_running_loop().time()
            logger.warning(
                "request %s, choice %d: an attempt ended after %d tokens, of which it made %d (%s); trying again%s",
                self._request.request_id,
                self._request.choice,
                len(self._output),
                len(self._output) - known,
                reason,
                ", in steps of its own" if history.isolate else "",
            )
            await asyncio.sleep(backoff_s(history.attempts, settings.first_backoff_s, settings.max_backoff_s))

    async def _attempt_noted(self, history: AttemptHistory) -> str | None:
        """Make one attempt and note its end in `history`. Returns why it did not finish the choice, or None.

        Sets `_failure` when no other attempt is to be made.
        """
        known = len(self._output)
        try:
            failure = await self._attempt(isolated=history.isolate)
        except ReplicaLost as lost:
            _raise_if_cancelled()
            if len(self._output) > known:
                history.progress()
            else:
                # An accepted stream waits for a place until its deadline: only losses by a replica that had it count.
                self._failure = history.lost(counts=lost.taken or not self._accepted, implicated=lost.implicated)
            return str(lost)
        if failure is None:
            return None
        if len(self._output) > known:
            history.progress()
        self._failure = history.refused(failure, accepted=self._accepted)
        return failure.message

    async def _attempt(self, *, isolated: bool) -> Failure | None:
        """Run one attempt to its end. Returns its failure, or None when the choice is finished.

        Raises `ReplicaLost`, even if this task was cancelled and the client turned that into `ReplicaLost`.
        """
        loop = asyncio.get_running_loop()
        silence_s = self._settings.silence_s
        remaining_s = None if self._deadline is None else max(0.0, self._deadline - loop.time())
        known = tuple(self._output.token_ids)
        request = replace(
            self._request,
            output_token_ids=known,
            isolated=isolated,
            remaining_s=remaining_s,
            accepted=self._accepted,
        )
        heard = False
        try:
            async with aclosing(self._client.open(request)) as replies, asyncio.timeout(None) as silence:
                with closing(IdleTimeout(loop, lambda: silence.reschedule(loop.time()), ignores_stalls=True)) as idle:
                    idle.set(silence_s)
                    async for reply in replies:
                        _raise_if_cancelled()
                        idle.set(silence_s)
                        if isinstance(reply, Waiting):
                            continue
                        if isinstance(reply, Failure):
                            if reply.code is FailureCode.REPLICA_LOST:
                                raise ReplicaLost(reply.message)
                            return reply
                        heard = True
                        self._receive(reply)
                        if self._output.finish_reason is not None:
                            return None
        except TimeoutError:
            if not silence.expired():
                raise
            raise ReplicaLost(f"nothing came for {silence_s:g} s", taken=heard) from None
        except BatchError as error:
            raise ReplicaLost(f"the replica sent an invalid batch: {error}") from error
        except asyncio.CancelledError:
            # A cancellation by the replica arrives as a bare CancelledError, like one of this task.
            raise ReplicaLost("the replica cancelled the attempt") from None
        raise ReplicaLost("the attempt ended without a last batch")

    def _receive(self, batch: TokenBatch) -> None:
        self._output.append(batch)
        self._accepted = True
        if self._lost_at is not None and batch.token_ids:
            self.recoveries_s.append(asyncio.get_running_loop().time() - self._lost_at)
            self._lost_at = None
        if batch.stats is not None:
            self._latest_stats = batch.stats
            if not self._request.numerics_id:
                self._request = replace(self._request, numerics_id=batch.stats.numerics_id)
        if self._has_news or not self._announced:
            self._changed.set()

    def _log_continued(self) -> None:
        request, stats = self._request, self._latest_stats
        if stats is None:
            return
        logger.info(
            "request %s, choice %d: continued; recomputing its tokens took %.3f s (queued for %.3f s)",
            *(request.request_id, request.choice, stats.prefill_s, stats.queued_s),
        )
        if request.numerics_id not in ("", stats.numerics_id):
            logger.warning(
                "request %s, choice %d: continued on a replica with other numerics, because none with the original "
                "ones is left; from here on the answer may differ from an undisturbed one",
                *(request.request_id, request.choice),
            )


def _raise_if_cancelled() -> None:
    """Raise `CancelledError` if this task was cancelled, even if a client replaced or swallowed that exception."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Generations:
    """Several choices of one request. Entering it starts them, leaving it cancels what still runs."""

    def __init__(self, client: ReplicaClient, settings: FailoverSettings) -> None:
        self._client = client
        self._settings = settings
        self._changed = asyncio.Event()
        self._running: dict[int, Generation] = {}

    def add(self, request: GenerationRequest, prior: TokenBatch | None = None) -> None:
        """Add a choice, which continues `prior` (see `Generation`). Call it before entering."""
        self._running[request.choice] = Generation(self._client, request, self._changed, self._settings, prior)

    async def __aenter__(self) -> Self:
        for generation in self._running.values():
            await generation.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(generation.aclose() for generation in self._running.values()))

    @property
    def recoveries_s(self) -> list[float]:
        """Those of all choices; see `Generation`."""
        return [seconds for generation in self._running.values() for seconds in generation.recoveries_s]

    async def stop(self, choice: int) -> None:
        """Generate no more of this choice."""
        await self._running[choice].aclose()

    def replies(self) -> AsyncGenerator[tuple[int, Reply], None]:
        """(choice, reply) of all of them, each as it comes, until all have ended or were stopped."""
        return interleave(self._running, self._changed)


async def interleave(
    generations: Mapping[int, Generation], changed: asyncio.Event
) -> AsyncGenerator[tuple[int, Reply], None]:
    """(key, reply) of all generations, each as it comes, until all have ended.

    A generation that is closed meanwhile counts as ended. `changed` is the event that they were made with.
    """
    running = dict(generations)
    while running:
        changed.clear()
        for key, generation in running.items():
            reply = generation.take()
            if reply is not None:
                yield key, reply
        running = {key: generation for key, generation in running.items() if not generation.ended}
        if running:
            await changed.wait()
