"""What one request may use: reserved before it starts, and given back as far as it was not used.

Promises that every reservation is settled once, however its request ends, and that a caller without limits costs
nothing. If the store of limits can't be reached, requests go on unlimited: the limits share a service out among its
users, and a service that refuses all of them because it can't count would be the worse failure. A metric counts them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Protocol

from serve_app.access.caller import Caller
from serve_app.access.quotas import (
    Ask,
    Demand,
    Measure,
    QuotaStore,
    QuotaUnavailable,
    Renew,
    Settle,
    Use,
    demands_of,
)
from serve_app.core import RequestError
from serve_app.observability import metrics as m

logger = logging.getLogger(__name__)

CODE = "rate_limit_exceeded"
"""OpenAI's code of a refusal."""
WARN_EVERY_S = 30.0
_RENEWALS = 3
"""A lease is renewed so often in its life: it outlives two failed renewals."""
_WHAT = {
    Measure.REQUESTS: "requests per minute",
    Measure.TOKENS: "tokens per minute",
    Measure.TOKENS_DAY: "tokens per day",
    Measure.STREAMS: "requests at once",
}


class LimitReached(RequestError):
    """A limit has no room for the request now."""

    def __init__(self, demand: Demand, uses: list[Use], use: Use, requested: int) -> None:
        """`uses`: all limits, as the request found them; `use`: the one that refuses it for longest."""
        super().__init__(_message(demand, use, requested), code=CODE, retry_after_s=use.wait_s)
        self.uses = uses
        self.kind = "tokens" if use.measure in (Measure.TOKENS, Measure.TOKENS_DAY) else "requests"
        """OpenAI's type of the error."""


class Outliving(Protocol):
    """What goes on to use tokens after its request is answered."""

    async def closed(self) -> None:
        """Wait until it uses no more here."""
        ...


class Quotas:
    """The limits of all callers, at one ingress."""

    def __init__(self, store: QuotaStore, metrics: m.MetricsSink) -> None:
        self._store = store
        self._metrics = metrics
        self._leases: dict[str, tuple[str, ...]] = {}
        """Lease -> its subjects."""
        self._renewing: asyncio.Task[None] | None = None
        self._warned_at = float("-inf")
        self._settling: set[asyncio.Task[None]] = set()
        self._refused: dict[Demand, tuple[float, Use]] = {}
        """Demand -> until when it has no room for a single request, by the loop's clock. A request is never given back,
        so until then the store need not be asked."""

    def reservation(self, caller: Caller) -> Reservation | None:
        """For a new request; None if the caller has no limits that are counted."""
        demands = demands_of(caller)
        return Reservation(self, caller, demands) if demands else None

    async def aclose(self) -> None:
        """Send what is left. Streams that still run here are settled as if they had used all they may."""
        if self._renewing is not None:
            self._renewing.cancel()
        if self._settling:
            await asyncio.wait(self._settling, timeout=1.0)
        await self._store.aclose()

    def refuse_known(self, caller: Caller, demands: tuple[Demand, ...]) -> None:
        """Raise `LimitReached` if it is known that no request of these demands can be counted now."""
        now = asyncio.get_running_loop().time()
        for demand in demands:
            until, use = self._refused.get(demand, (0.0, None))
            if use is not None and until <= now:
                del self._refused[demand]
            elif use is not None:
                left = Use(use.subject, use.measure, use.most, use.used, use.reset_s, until - now)
                raise self._refusal(caller, demand, [left], left, 1)

    async def ask(self, caller: Caller, ask: Ask) -> list[Use]:
        """Count a request. [] if the store can't be reached. Raises `LimitReached`."""
        self.refuse_known(caller, ask.demands)
        if ask.stream:
            self._hold(ask)
        try:
            uses = await self._store.ask(ask)
        except QuotaUnavailable as error:
            self._unlimited(error)
            return []
        refused = [use for use in uses if use.wait_s]
        if not refused:
            return uses
        if ask.stream:
            self._leases.pop(ask.lease, None)
        for use in refused:
            if use.measure is Measure.REQUESTS:
                until = asyncio.get_running_loop().time() + use.wait_s
                self._refused[ask.demands[use.subject]] = (until, use)
        last = max(refused, key=lambda use: use.wait_s)
        requested = ask.tokens if last.measure in (Measure.TOKENS, Measure.TOKENS_DAY) else 1
        raise self._refusal(caller, ask.demands[last.subject], uses, last, requested)

    def settle(self, lease: str, used_tokens: int) -> None:
        """The request of this lease has ended."""
        subjects = self._leases.pop(lease, None)
        if subjects is not None:
            self._store.tell(Settle(lease, subjects, used_tokens))

    def settle_later(self, lease: str, stream: Outliving, used_tokens: Callable[[], int]) -> None:
        """Settle once `stream` has ended here."""

        async def settle() -> None:
            try:
                await stream.closed()
            finally:
                self.settle(lease, used_tokens())

        # A context of its own: Serve cancels all that was called in the context of a request when its client goes.
        self.in_background(settle())

    def in_background(self, work: Awaitable[None]) -> None:
        """Do `work` in a task that the request does not end."""

        async def do() -> None:
            await work

        task = asyncio.create_task(do(), name="reservation", context=Context())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    def _hold(self, ask: Ask) -> None:
        self._leases[ask.lease] = tuple(demand.subject for demand in ask.demands)
        if self._store.lease_s is not None and (self._renewing is None or self._renewing.done()):
            renewing = self._renew(self._store.lease_s / _RENEWALS)
            self._renewing = asyncio.create_task(renewing, name="renewal of leases", context=Context())

    async def _renew(self, period_s: float) -> None:
        """Renew the leases of all requests that run, for as long as there are any."""
        while self._leases:
            await asyncio.sleep(period_s)
            if self._leases:
                subjects = {subject for held in self._leases.values() for subject in held}
                self._store.tell(Renew(tuple(self._leases), tuple(subjects)))

    def _refusal(self, caller: Caller, demand: Demand, uses: list[Use], use: Use, requested: int) -> LimitReached:
        self._metrics.count(m.LIMITED_REQUESTS, 1, {"tenant": caller.tenant, "limit": use.measure.name.lower()})
        return LimitReached(demand, uses, use, requested)

    def _unlimited(self, error: QuotaUnavailable) -> None:
        self._metrics.count(m.UNLIMITED_REQUESTS, 1)
        now = asyncio.get_running_loop().time()
        if now >= self._warned_at + WARN_EVERY_S:
            self._warned_at = now
            logger.warning("the store of limits can't be reached, so requests are not limited: %s", error)


class Reservation:
    """What one request of a caller with limits may use. Made for every request; `end` must be called."""

    def __init__(self, quotas: Quotas, caller: Caller, demands: tuple[Demand, ...]) -> None:
        self._quotas = quotas
        self._caller = caller
        self._lease = secrets.token_urlsafe(12)
        self._counted = False
        self._outliving: tuple[Outliving, Callable[[], int]] | None = None
        self.demands = demands
        self.uses: list[Use] = []
        """The limits as the request found them; empty until it is counted."""
        self.tokens = 0
        """Reserved."""
        self.granted = False

    def check(self) -> None:
        """Raise `LimitReached` if it is known already that the request can't be counted."""
        try:
            self._quotas.refuse_known(self._caller, self.demands)
        except LimitReached as refusal:
            self._refused(refusal)
            raise

    def cost(self, measure: Measure) -> int:
        """What the request was counted with; 0 if it was refused."""
        if not self.granted:
            return 0
        return self.tokens if measure in (Measure.TOKENS, Measure.TOKENS_DAY) else 1

    def _refused(self, refusal: LimitReached) -> None:
        self._counted = True
        self.uses = refusal.uses

    async def take(self, tokens: int = 0, *, stream: bool = False) -> None:
        """Count the request, once. `stream`: it generates, with prompts and longest answers of so many `tokens`.

        Raises `LimitReached`, and has reserved nothing then.
        """
        self._counted = True
        self.tokens = tokens
        try:
            self.uses = await self._quotas.ask(self._caller, Ask(self._lease, self.demands, tokens, stream))
            self.granted = True
        except LimitReached as refusal:
            self._refused(refusal)
            raise
        except asyncio.CancelledError:  # the store may have counted it
            self._quotas.settle(self._lease, 0)
            raise

    def costs_nothing(self) -> None:
        """It is no new request: it reads on."""
        self._counted = True

    def outlived_by(self, stream: Outliving, used_tokens: Callable[[], int]) -> None:
        """`stream` goes on with what is reserved, after its request is answered."""
        self._outliving = stream, used_tokens

    def end(self, used_tokens: int) -> None:
        """The request is answered, or has failed. What it did not use is given back, unless something outlives it."""
        if not self._counted:  # it was wrong before its size was known: it counts, and nobody waits for that
            self._quotas.in_background(self._count())
        elif self._outliving is not None:
            self._quotas.settle_later(self._lease, *self._outliving)
        else:
            self._quotas.settle(self._lease, used_tokens)

    async def _count(self) -> None:
        try:
            await self.take()
        except LimitReached:
            logger.debug("a request that was refused for another reason was over a limit too")


def _message(demand: Demand, use: Use, requested: int) -> str:
    kind, _, name = demand.subject.partition(" ")
    whose = f"the {kind} {name}"
    if use.measure is Measure.STREAMS:
        return f"The {kind} {name} has {use.used} of at most {use.most} requests in progress; wait for one to end."
    return (
        f"Rate limit reached for {whose} on {_WHAT[use.measure]}: limit {use.most}, used {use.used}, requested "
        f"{requested}. Please try again in {use.wait_s:.3f} s."
    )
