"""Counts what callers use, in the memory of one process, with a clock that the caller provides.

Promises that all limits of a request are judged and counted in one step. Keeps four counters for each key and tenant
that has limits, so it grows with their number and not with that of requests.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.access.quotas import STREAM_WAIT_S, Answer, Ask, Demand, Measure, Message, Renew, Settle, Use
from serve_app.access.windows import DAY_S, MINUTE_S, Window


@dataclass(slots=True)
class _Counters:
    """What one key, or one tenant, uses."""

    windows: tuple[Window, Window, Window]
    """By `Measure`."""
    leases: set[str] = field(default_factory=set)
    """Of its streams."""


@dataclass(slots=True)
class _Lease:
    tokens: int
    counted: tuple[tuple[str, int, int], ...]
    """(subject, index of the minute, index of the day) wherever its tokens were counted."""
    expires_s: float


class MemoryQuotas:
    """All counters of one store."""

    def __init__(self, lease_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        """`lease_s`: see `QuotaStore`. `clock`: in seconds; all clocks of a service cut time into the same days."""
        self._lease_s = float("inf") if lease_s is None else lease_s
        self._clock = clock
        self._counters: dict[str, _Counters] = {}
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        """The one that expires first is first."""

    def perform(self, message: Message) -> Answer:
        """See `QuotaStore`."""
        now_s = self._clock()
        self._expire(now_s)
        match message:
            case Ask():
                return self._ask(message, now_s)
            case Settle():
                self._settle(message, now_s)
            case Renew():
                for name in message.leases:
                    if (lease := self._leases.get(name)) is not None:
                        lease.expires_s = now_s + self._lease_s
                        self._leases.move_to_end(name)
        return []

    def _ask(self, ask: Ask, now_s: float) -> Answer:
        known = ask.lease in self._leases
        there = [self._of(demand.subject, now_s) for demand in ask.demands]
        uses = [
            use
            for number, (demand, counters) in enumerate(zip(ask.demands, there, strict=True))
            for use in _uses(number, demand, counters, ask, now_s, known=known)
        ]
        if known or any(use.wait_s for use in uses):
            return uses
        for counters in there:
            requests, minute, day = counters.windows
            requests.current += 1
            minute.current += ask.tokens
            day.current += ask.tokens
            if ask.stream:
                counters.leases.add(ask.lease)
        if ask.stream:
            counted = tuple(
                (demand.subject, counters.windows[Measure.TOKENS].index, counters.windows[Measure.TOKENS_DAY].index)
                for demand, counters in zip(ask.demands, there, strict=True)
            )
            self._leases[ask.lease] = _Lease(ask.tokens, counted, now_s + self._lease_s)
        return uses

    def _settle(self, settle: Settle, now_s: float) -> None:
        lease = self._leases.pop(settle.lease, None)
        if lease is None:
            return
        unused = lease.tokens - settle.used_tokens
        for subject, minute, day in lease.counted:
            counters = self._of(subject, now_s)
            counters.windows[Measure.TOKENS].give_back(unused, minute)
            counters.windows[Measure.TOKENS_DAY].give_back(unused, day)
            counters.leases.discard(settle.lease)

    def _of(self, subject: str, now_s: float) -> _Counters:
        counters = self._counters.get(subject)
        if counters is None:
            counters = self._counters[subject] = _Counters((Window(MINUTE_S), Window(MINUTE_S), Window(DAY_S)))
        for window in counters.windows:
            window.roll(now_s)
        return counters

    def _expire(self, now_s: float) -> None:
        while self._leases:
            name, lease = next(iter(self._leases.items()))
            if now_s < lease.expires_s:
                break
            del self._leases[name]
            for subject, _, _ in lease.counted:
                self._counters[subject].leases.discard(name)


def _uses(number: int, demand: Demand, counters: _Counters, ask: Ask, now_s: float, *, known: bool) -> Answer:
    """The limits of one demand. `known`: the request is counted already."""
    uses: Answer = []
    for measure in (Measure.REQUESTS, Measure.TOKENS, Measure.TOKENS_DAY):
        if (most := demand.most(measure)) is not None:
            window = counters.windows[measure]
            cost = 0 if known else 1 if measure is Measure.REQUESTS else ask.tokens
            used = window.used(now_s)
            wait_s = window.wait_s(now_s, most, cost) if used + cost > most and cost else 0.0
            uses.append(Use(number, measure, most, used, window.reset_s(now_s, cost), wait_s))
    if (most := demand.streams) is not None:
        taken = len(counters.leases)
        wait_s = STREAM_WAIT_S if ask.stream and not known and taken >= most else 0.0
        uses.append(Use(number, Measure.STREAMS, most, taken, 0.0, wait_s))
    return uses


class MemoryQuotaStore:
    """A `QuotaStore` for the one ingress of a service: it needs no message, and its leases end with it."""

    lease_s: float | None = None

    def __init__(self, quotas: MemoryQuotas | None = None) -> None:
        self._quotas = quotas or MemoryQuotas()

    async def ask(self, ask: Ask) -> Answer:
        """See `QuotaStore`."""
        return self._quotas.perform(ask)

    def tell(self, message: Settle | Renew) -> None:
        """See `QuotaStore`. Done at once."""
        self._quotas.perform(message)

    async def aclose(self) -> None:
        """Nothing to let go of."""
