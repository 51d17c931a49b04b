"""One client-visible choice over one or more attempts on model replicas (P2).

Promises the tokens of one uninterrupted attempt, whichever replicas die, and that closing it cancels the work at
once (P5). Pure asyncio over a `ReplicaClient`: knows no transport, no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from types import TracebackType

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    Reply,
    TokenBatch,
)
from serve_app.generation.output_tokens import Journal, JournalError
from serve_app.generation.replica import ReplicaClient, ReplicaLost
from serve_app.idle_timeout import Alarm

logger = logging.getLogger(__name__)

_NO_PLACE_NOW = frozenset({FailureCode.OVERLOADED, FailureCode.NOT_READY})
"""Refusals that end a new request at once, and that an accepted one waits out."""


@dataclass(frozen=True, slots=True)
class FailoverSettings:
    """When an attempt counts as lost, and how often another is made."""

    silence_s: float = 5.0
    """A replica says something each second, if only "alive"; after this long without a word it is taken for lost."""
    max_attempts: int = 10
    """Attempts that may be lost in a row without one new token before the choice fails. Of an accepted stream only
    those count that a replica had taken: it waits for a replica until its deadline."""
    alone_after: int = 2
    """After so many of them in a row the request is a suspect of having killed its replicas: it is computed alone, to
    take nobody with it. One such loss is mostly bad luck: all that waited beside a replica's death have it."""
    max_blamed: int = 2
    """Replicas that may die computing it alone before it is refused for that. An innocent suspect meets an unrelated
    death in just that moment once in a while, but hardly twice without a token in between."""
    max_mismatches: int = 8
    """Refusals by replicas of other weights, in a row (about 2.5 s): one of its own may be there and not known yet."""
    first_backoff_s: float = 0.02
    """Before the second attempt. Resubmitting on a Serve handle reaches a live replica in under 20 ms."""
    max_backoff_s: float = 2.0

    def backoff_s(self, attempt: int) -> float:
        """Pause after the `attempt`-th attempt in a row (from 1): doubling, capped, jittered by half each way."""
        return random.uniform(0.5, 1.5) * min(self.max_backoff_s, self.first_backoff_s * 2.0 ** min(attempt - 1, 30))


class _Losses:
    """What the attempts since the last new token say of a request: unlucky, a suspect, or what kills its replicas."""

    def __init__(self, settings: FailoverSettings) -> None:
        self._settings = settings
        self.attempts = 0
        """All that ended without the answer, whatever the reason; the pause before the next grows with them."""
        self._lost = self._blamed = self._mismatches = 0

    def progress(self) -> None:
        """An attempt brought new tokens before it ended: whatever happened before was not this request's doing."""
        self.attempts = 1
        self._lost = self._blamed = self._mismatches = 0

    @property
    def suspect(self) -> bool:
        """The next attempt is to be computed alone."""
        return self._lost >= self._settings.alone_after

    def lost(self, *, counts: bool, blamed: bool) -> Failure | None:
        """Note a replica's loss; the failure that follows from it, if it was one too many."""
        self.attempts += 1
        self._lost += counts
        self._blamed += blamed
        if self._blamed >= self._settings.max_blamed:
            return _poison(self._blamed)
        return _given_up(self._lost) if self._lost >= self._settings.max_attempts else None

    def refused(self, failure: Failure, *, accepted: bool) -> Failure | None:
        """Note a replica's refusal; what the choice fails with when it is not to be repeated."""
        self.attempts += 1
        if failure.code is FailureCode.WRONG_WEIGHTS:
            self._mismatches += 1
            return failure if self._mismatches >= self._settings.max_mismatches else None
        return None if accepted and failure.code in _NO_PLACE_NOW else failure


class Generation:
    """One choice. Use it as an async context manager: entering starts it, leaving cancels what still runs.

    It reads its replica in a task of its own, as fast as replies come, and journals them on receipt: Serve drops
    what was delivered but not read when a replica dies. `take` hands out what is new; a reader that is late gets
    fewer and larger batches, so what waits for it is never more than `max_new_tokens` ids.
    """

    def __init__(
        self,
        client: ReplicaClient,
        request: GenerationRequest,
        changed: asyncio.Event,
        settings: FailoverSettings | None = None,
        prior: TokenBatch | None = None,
    ) -> None:
        """`request` is the first attempt's: nothing of its output was delivered; `remaining_s` counts from entering.

        `changed` is set whenever `take` may have something to give. `prior`: what an earlier generation of the same
        request, which had been accepted, delivered from the start, with the counters that came with its first tokens;
        this one continues after it.
        """
        self._client = client
        self._request = request
        self._changed = changed
        self._settings = settings or FailoverSettings()
        self._journal = Journal(request.max_new_tokens, with_logprobs=request.sampling.logprobs is not None)
        self._taken = 0
        self._deadline: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._accepted = False
        self._announced = False
        self._finish_reason: FinishReason | None = None
        self._stats: GenerationStats | None = None
        """Of the attempt that spoke last."""
        self._counted = False
        self._to_tell: GenerationStats | None = None
        self._failure: Failure | None = None
        self.ended = False
        """`take` has handed out the last reply."""
        if prior is not None:
            self._journal.append(prior)
            self._taken = len(self._journal)
            self._accepted = self._announced = True
            if prior.stats is not None:
                self._counted = True
                self._request = replace(request, arithmetic=prior.stats.arithmetic)

    async def __aenter__(self) -> Generation:
        if self._request.remaining_s is not None:
            self._deadline = asyncio.get_running_loop().time() + self._request.remaining_s
        self._task = asyncio.create_task(self._read(), name=f"generation {self._request.request_id}")
        self._task.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
        a `finish_reason` or a `Failure`. `stats` come once, with the first tokens: they are those of the first attempt
        that delivered some, since what another one finds in its cache is no saving of the caller's. Raises what the
        client raised against its contract.
        """
        if self.ended:
            return None
        if len(self._journal) > self._taken or self._finish_reason or (self._accepted and not self._announced):
            return self._new_batch()
        if self._failure is not None:
            self.ended = True
            return self._failure
        if self._task is not None and self._task.done():
            self.ended = True
            self._task.result()
        return None

    def _new_batch(self) -> TokenBatch:
        first = self._taken
        self._taken = len(self._journal)
        self._announced = True
        self.ended = self._finish_reason is not None
        stats, self._to_tell = self._to_tell, None
        if not self.ended and self._task is not None and self._task.done():
            self._changed.set()  # its last word is next, and nothing more will say so
        return TokenBatch(
            first_index=first,
            token_ids=tuple(self._journal.token_ids[first:]),
            logprobs=None if self._request.sampling.logprobs is None else tuple(self._journal.logprobs[first:]),
            finish_reason=self._finish_reason,
            stats=stats,
        )

    async def _read(self) -> None:
        """The task: attempts until the choice has ended, within the deadline."""
        try:
            async with asyncio.timeout_at(self._deadline) as deadline:
                await self._run_attempts()
        except TimeoutError:
            if not deadline.expired():
                raise
            message = f"The request was not finished within its {self._request.remaining_s:g} s."
            self._failure = Failure(FailureCode.DEADLINE_EXCEEDED, message)

    async def _run_attempts(self) -> None:
        if self._finished_by_journal():  # an earlier generation delivered all but the last word
            return
        losses = _Losses(self._settings)
        while True:
            delivered = len(self._journal)
            reason = await self._attempt_noted(losses)
            if reason is None or self._finished_by_journal() or self._failure is not None:
                if reason is None and losses.attempts and self._stats is not None:
                    logger.info(
                        "request %s, choice %d: continued; computing what it had again took %.3f s (queued for %.3f s)",
                        self._request.request_id,
                        self._request.choice,
                        self._stats.prefill_s,
                        self._stats.queued_s,
                    )
                    if self._request.arithmetic not in ("", self._stats.arithmetic):
                        logger.warning(
                            "request %s, choice %d: no replica was left that computes as the one that began it; from "
                            "here on it may differ from an undisturbed answer",
                            self._request.request_id,
                            self._request.choice,
                        )
                return
            logger.warning(
                "request %s, choice %d: an attempt ended after %d tokens, %d of them its own (%s); trying again%s",
                self._request.request_id,
                self._request.choice,
                len(self._journal),
                len(self._journal) - delivered,
                reason,
                ", alone" if losses.suspect else "",
            )
            await asyncio.sleep(self._settings.backoff_s(losses.attempts))

    async def _attempt_noted(self, losses: _Losses) -> str | None:
        """One attempt, and in `losses` how it ended; why it did not finish the choice, if it did not.

        Sets `_failure` when no other attempt is to be made.
        """
        delivered = len(self._journal)
        try:
            failure = await self._attempt(alone=losses.suspect)
        except ReplicaLost as lost:
            if len(self._journal) > delivered:
                losses.progress()
            else:
                # An accepted stream waits for a place until its deadline. Only what a replica did with it counts.
                self._failure = losses.lost(counts=lost.taken or not self._accepted, blamed=lost.blamed)
            return str(lost)
        if failure is None:
            return None
        if len(self._journal) > delivered:
            losses.progress()
        self._failure = losses.refused(failure, accepted=self._accepted)
        return failure.message

    async def _attempt(self, *, alone: bool) -> Failure | None:
        """One attempt to its end; None when the choice is finished. Raises `ReplicaLost`."""
        loop = asyncio.get_running_loop()
        silence_s = self._settings.silence_s
        request = self._next_request(alone=alone)
        heard = False
        try:
            async with aclosing(self._client.open(request)) as replies, asyncio.timeout(None) as silence:
                with closing(Alarm(loop, lambda: silence.reschedule(loop.time()), patient=True)) as alarm:
                    alarm.set(silence_s)
                    async for reply in replies:
                        _raise_if_cancelled()
                        alarm.set(silence_s)
                        if isinstance(reply, Failure):
                            if reply.code is FailureCode.REPLICA_LOST:
                                raise ReplicaLost(reply.message)
                            return reply
                        heard = True
                        self._receive(reply)
                        if self._finish_reason is not None:
                            return None
        except TimeoutError:
            if not silence.expired():
                raise
            raise ReplicaLost(f"nothing came for {silence_s:g} s", taken=heard) from None
        except ReplicaLost:
            _raise_if_cancelled()
            raise
        except JournalError as error:
            _raise_if_cancelled()
            raise ReplicaLost(f"what came can't be right: {error}") from error
        except asyncio.CancelledError:
            # A replica's own cancellation arrives as a bare CancelledError: nobody has cancelled this task.
            _raise_if_cancelled()
            raise ReplicaLost("the replica cancelled the attempt") from None
        _raise_if_cancelled()
        raise ReplicaLost("the attempt ended without a last word")

    def _next_request(self, *, alone: bool) -> GenerationRequest:
        request = replace(self._request, output_token_ids=tuple(self._journal.token_ids), alone=alone)
        if self._deadline is None:
            return request
        return replace(request, remaining_s=max(0.0, self._deadline - asyncio.get_running_loop().time()))

    def _receive(self, batch: TokenBatch) -> None:
        self._journal.append(batch)
        self._accepted = True
        self._finish_reason = batch.finish_reason
        if batch.stats is not None:
            self._stats = batch.stats
            if not self._request.arithmetic:
                self._request = replace(self._request, arithmetic=batch.stats.arithmetic)
            if not self._counted:
                self._counted, self._to_tell = True, batch.stats
        if len(self._journal) > self._taken or self._finish_reason or not self._announced:
            self._changed.set()

    def _finished_by_journal(self) -> bool:
        """Whether what was delivered is already the whole answer, so that only the last word was lost."""
        if len(self._journal) > 0 and self._journal.token_ids[-1] in self._request.stop_token_ids:
            self._finish_reason = FinishReason.STOP
        elif len(self._journal) >= self._request.max_new_tokens:
            self._finish_reason = FinishReason.LENGTH
        return self._finish_reason is not None


async def interleave(
    generations: Sequence[Generation], changed: asyncio.Event
) -> AsyncGenerator[tuple[int, Reply], None]:
    """(position in `generations`, reply) of all of them, each as it comes, until all have ended.

    A generation that is closed meanwhile counts as ended. `changed` is the event that they were made with.
    """
    running = list(enumerate(generations))
    while running:
        changed.clear()
        for position, generation in running:
            reply = generation.take()
            if reply is not None:
                yield position, reply
        running = [(position, generation) for position, generation in running if not generation.ended]
        if running:
            await changed.wait()


def _raise_if_cancelled() -> None:
    """Raise `CancelledError` if this task was told to stop, whatever a client made of that."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _given_up(attempts: int) -> Failure:
    tried = "once" if attempts == 1 else f"{attempts} times"
    message = f"The model's replica was lost and the answer could not be continued (tried {tried}). Repeat the request."
    return Failure(FailureCode.REPLICA_LOST, message, retry_after_s=1.0)


def _poison(replicas: int) -> Failure:
    message = f"This request was refused: {replicas} replicas of the model died while computing it and nothing else."
    return Failure(FailureCode.POISON, message)
