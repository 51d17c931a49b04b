"""A queue that shares a service between tenants by the tokens of what they ask, in proportion to their weights.

Start-time fair queueing (P. Goyal, H. Vin, H. Cheng: "Start-Time Fair Queueing: A Scheduling Algorithm for Integrated
Services Packet Switching Networks", SIGCOMM 1996), with tokens for bits, as the virtual token counters of Y. Sheng and
others ("Fairness in Serving Large Language Models", OSDI 2024) have it. Each tenant has a tag. The tenant with the
lowest tag starts an item next, and its tag then rises by the item's tokens divided by the tenant's weight. Virtual time
is the highest that the lowest tag has been at a start. A tenant that has nothing waiting and asks again takes part from
the virtual time on, so that it gets no credit for the time in which it asked nothing.

Promises, with C for the tokens of a tenant's largest item:

- Items of one tenant start in their order.
- While two tenants both have items waiting, the tokens that they start, each divided by its weight, differ by at most
  C / weight of the one plus C / weight of the other (theorem 1 of the paper).
- A tenant with nothing waiting, and no tokens of its own ahead of the virtual time, waits for at most one item of each
  other tenant, however many they have in the queue. Where the tokens of items are estimates that turn out too high,
  a tenant gets the difference back, and it may be as much as C: then it is one item and C tokens of each other tenant.
- Among equal tags the item that came first starts first. So the items of one tenant alone start in their order.
- An item of the class `BATCH` starts only when no `INTERACTIVE` item waits. Each class is shared by itself.

`n` items of `t` tenants: all operations take O(log t), `tokens_before` takes O(t). Knows no clock and no event loop.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve_app.core import Priority

_Item = TypeVar("_Item", bound=Hashable)

FORGET_FROM = 64
"""With fewer tenants than this, none is forgotten while anything is waiting or started."""


@dataclass(slots=True, eq=False)
class _Tenant(Generic[_Item]):
    name: str
    weight: float
    tag: float
    """Virtual time at which its next item starts."""
    waiting: OrderedDict[_Item, tuple[int, int]] = field(default_factory=OrderedDict)
    """Item -> its number in the order of arrival, and its tokens."""
    waiting_tokens: int = 0
    entry: tuple[float, int, int, _Tenant[_Item]] | None = None
    """Its place in the heap: tag, number of its first item, number of the entry, itself. Other entries of this tenant
    in the heap are outdated."""


@dataclass(frozen=True, slots=True)
class _Start(Generic[_Item]):
    """An item that has started, and what its tenant was charged for it."""

    tenant: _Tenant[_Item]
    priority: Priority
    tokens: int
    weight: float


class FairQueue(Generic[_Item]):
    """Items of tenants, in two classes: first they wait, then they have started, then they have ended."""

    def __init__(self) -> None:
        self._classes: dict[Priority, _Class[_Item]] = {priority: _Class() for priority in Priority}
        self._waiting: dict[_Item, tuple[Priority, _Tenant[_Item]]] = {}
        self._started: dict[_Item, _Start[_Item]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    def __contains__(self, item: object) -> bool:
        """Whether the item waits."""
        return item in self._waiting

    def __iter__(self) -> Iterator[_Item]:
        """The items that wait, in the order of their arrival."""
        return iter(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all items that wait."""
        return sum(one.tokens for one in self._classes.values())

    def add(
        self,
        item: _Item,
        *,
        tokens: int,
        tenant: str = "",
        weight: float = 1.0,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Let an item wait, behind the others of its tenant and class.

        `tokens`: what it costs, at least as far as it is known; 0 counts as 1. `weight`: the tenant's share from here
        on. Raises `ValueError` for a weight that is not a positive number, and for an item that is here already.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight must be a positive number, not {weight}")
        if item in self._waiting or item in self._started:
            raise ValueError("this item is in the queue already")
        self._arrivals += 1
        found = self._classes[priority].add(item, self._arrivals, max(1, tokens), tenant, weight)
        self._waiting[item] = priority, found

    def first(self) -> _Item | None:
        """The item that should start next. It keeps waiting until it is started."""
        for one in self._classes.values():  # interactive comes first
            if (item := one.first()) is not None:
                return item
        return None

    def firsts(self) -> Iterator[_Item]:
        """The first item of each tenant and class, in the order in which they would start. The queue must not change
        meanwhile."""
        for one in self._classes.values():
            yield from one.firsts()

    def start(self, item: _Item) -> None:
        """Take an item that waits, the `first` or another one, and charge its tenant for it. `end` must follow."""
        priority, tenant = self._waiting.pop(item)
        tokens = self._classes[priority].start(item, tenant)
        self._started[item] = _Start(tenant, priority, tokens, tenant.weight)

    def end(self, item: _Item, tokens: int | None = None) -> None:
        """An item that was started has ended. `tokens`: what it did cost; None: what was said when it was added."""
        start = self._started.pop(item)
        if tokens is not None:
            self._classes[start.priority].correct(start.tenant, start.tokens, max(1, tokens), start.weight)
        self._forget_if_idle()

    def remove(self, item: _Item) -> None:
        """Drop an item that waits. Its tenant is charged nothing."""
        priority, tenant = self._waiting.pop(item)
        self._classes[priority].remove(item, tenant)
        self._forget_if_idle()

    def tokens_before(self, tenant: str = "", weight: float = 1.0, priority: Priority = Priority.INTERACTIVE) -> float:
        """Tokens of the waiting items that would start before a new item of this tenant and class, if no others came.

        It is right to one item of each other tenant. Items that have started are not among them.
        """
        before = self._classes[priority].tokens_before(tenant, weight)
        if priority is Priority.BATCH:
            before += self._classes[Priority.INTERACTIVE].tokens
        return before

    def _forget_if_idle(self) -> None:
        """Begin anew when nothing waits and nothing runs: nobody owes anything for capacity that nobody else wanted."""
        if not (self._waiting or self._started):
            for one in self._classes.values():
                one.reset()


class _Class(Generic[_Item]):
    """The tenants of one class, and its virtual time."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of all items that wait."""
        self._now = 0.0
        """Virtual time."""
        self._tenants: dict[str, _Tenant[_Item]] = {}
        self._heap: list[tuple[float, int, int, _Tenant[_Item]]] = []
        self._entries = 0
        self._limit = FORGET_FROM

    def add(self, item: _Item, number: int, tokens: int, name: str, weight: float) -> _Tenant[_Item]:
        tenant = self._tenants.get(name)
        if tenant is None:
            self._forget()
            tenant = self._tenants[name] = _Tenant(name, weight, self._now)
        tenant.weight = weight
        idle = not tenant.waiting
        tenant.waiting[item] = number, tokens
        tenant.waiting_tokens += tokens
        self.tokens += tokens
        if idle:
            tenant.tag = max(tenant.tag, self._now)
            self._place(tenant)
        return tenant

    def first(self) -> _Item | None:
        heap = self._heap
        while heap and heap[0][3].entry is not heap[0]:
            heapq.heappop(heap)
        return next(iter(heap[0][3].waiting)) if heap else None

    def firsts(self) -> list[_Item]:
        entries = sorted(tenant.entry for tenant in self._tenants.values() if tenant.entry is not None)
        return [next(iter(tenant.waiting)) for *_, tenant in entries]

    def start(self, item: _Item, tenant: _Tenant[_Item]) -> int:
        """Take the item and charge for it; returns its tokens."""
        self.first()  # the lowest tag is on top of the heap now; that of an item out of turn may be far higher
        self._now = max(self._now, self._heap[0][0])
        tokens = self._take(item, tenant)
        tenant.tag += tokens / tenant.weight
        self._place(tenant)
        return tokens

    def remove(self, item: _Item, tenant: _Tenant[_Item]) -> None:
        self._take(item, tenant)
        self._place(tenant)

    def correct(self, tenant: _Tenant[_Item], charged: int, tokens: int, weight: float) -> None:
        """Charge what an item did cost instead of what was estimated.

        The virtual time has moved with the estimates. So what comes back puts a tenant at most one item of the real
        cost before it: otherwise a tenant that always asks for a thousand times what it uses would save up a turn of
        its own, in which others get nothing.
        """
        tag = tenant.tag + (tokens - charged) / weight
        if tokens < charged:
            tag = max(tag, min(tenant.tag, self._now - tokens / weight))
        tenant.tag = tag
        self._place(tenant)

    def tokens_before(self, name: str, weight: float) -> float:
        own = self._tenants.get(name)
        tag = self._now
        before = 0.0
        if own is not None:
            before = own.waiting_tokens
            tag = (own.tag if own.waiting else max(own.tag, self._now)) + own.waiting_tokens / weight
        for other in self._tenants.values():
            if other is not own and other.waiting and other.tag <= tag:
                first = next(iter(other.waiting.values()))[1]
                before += min(other.waiting_tokens, max(first, (tag - other.tag) * other.weight))
        return before

    def reset(self) -> None:
        self._now = 0.0
        self._tenants.clear()
        self._heap.clear()
        self._limit = FORGET_FROM

    def _take(self, item: _Item, tenant: _Tenant[_Item]) -> int:
        _, tokens = tenant.waiting.pop(item)
        tenant.waiting_tokens -= tokens
        self.tokens -= tokens
        return tokens

    def _place(self, tenant: _Tenant[_Item]) -> None:
        """Put the tenant where its tag and its first item belong, if it has an item."""
        if not tenant.waiting:
            tenant.entry = None
            return
        number, _ = next(iter(tenant.waiting.values()))
        if tenant.entry is None or tenant.entry[:2] != (tenant.tag, number):
            self._entries += 1
            tenant.entry = tenant.tag, number, self._entries, tenant
            heapq.heappush(self._heap, tenant.entry)
            if len(self._heap) > 2 * len(self._tenants) + FORGET_FROM:
                self._heap = [one.entry for one in self._tenants.values() if one.entry is not None]
                heapq.heapify(self._heap)

    def _forget(self) -> None:
        """Drop the tenants that have nothing waiting and owe nothing, now and then: each addition pays for one."""
        if len(self._tenants) >= self._limit:
            self._tenants = {n: one for n, one in self._tenants.items() if one.waiting or one.tag > self._now}
            self._limit = max(FORGET_FROM, 2 * len(self._tenants))


def may_take_from(taken: int, weight: float, holds: int, others_weight: float) -> bool:
    """Whether a tenant that has taken so many places may take one more from another, which holds so many.

    Only if the other one has no fewer for its weight afterwards. So no two tenants take a place from each other in
    turns.
    """
    return (holds - 1) * weight >= (taken + 1) * others_weight


class ExpectedTokens:
    """How long the next answer of a tenant will be, as its last ones tell: many requests allow far more than they use.

    It is an exponential mean, in which each answer counts for an eighth.
    """

    MOST_TENANTS = 10_000

    def __init__(self) -> None:
        self._means: OrderedDict[str, float] = OrderedDict()
        self._of_all: float | None = None

    def of(self, tenant: str, most: int) -> int:
        """Tokens to expect of the tenant's next answer, which may have at most `most`.

        For a tenant's first answer those of all tenants tell, and for the very first one `most`.
        """
        mean = self._means.get(tenant, self._of_all)
        return most if mean is None else min(most, math.ceil(mean))

    def ended(self, tenant: str, tokens: int) -> None:
        """An answer of the tenant has ended after so many tokens."""
        self._means[tenant] = _mean(self._means.pop(tenant, None), tokens)
        self._of_all = _mean(self._of_all, tokens)
        if len(self._means) > self.MOST_TENANTS:
            self._means.popitem(last=False)


def _mean(before: float | None, tokens: int) -> float:
    return float(tokens) if before is None else before + (tokens - before) / 8
