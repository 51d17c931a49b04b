"""The free places of the model replicas, as one router knows them, and the queue of requests that wait for one.

Promises that requests wait in one queue, in order, and wake when a place is free. A waiting request does not ask any
replica, unless other routers hold its places. Knows no Ray and no request.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_app.backoff import backoff_s

FIRST_PAUSE_S = 0.05
"""Pause before another try at a replica whose places other routers hold: they don't tell when they free one. The
replica may also need some milliseconds to notice that one of our requests was cancelled."""
MAX_PAUSE_S = 1.0
"""The pause doubles up to this, until a request is accepted."""

Choose = Callable[[Mapping[str, int]], str | None]
"""Replicas that have room -> their numbers of requests; returns one of them, or None if the request should wait."""


@dataclass(slots=True)
class _Replica:
    limit: int
    """Requests that the replica takes at once; 0 when it has gone."""
    ours: int = 0
    """Places that this router has given away: on their way to the replica, or accepted."""
    accepted: int = 0
    others: int = 0
    """Places that others hold, as far as the replica's last answer says."""


@dataclass(slots=True)
class _Place:
    replica: _Replica
    sent: bool = False
    accepted: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    order: tuple[bool, float]
    key: str
    choose: Choose
    found: asyncio.Future[str | None]


class Places:
    """The places and the queue of one router, on its event loop."""

    def __init__(self, *, shared: bool = False) -> None:
        """`shared`: there may be other routers. If this one holds a place at a replica, it leaves them the last one."""
        self._shared = shared
        self._replicas: dict[str, _Replica] = {}
        self._places: dict[str, _Place] = {}
        self._waiters: list[_Waiter] = []
        self._failures = 0
        self._timer: asyncio.Handle | None = None

    def update(self, limits: Mapping[str, int]) -> None:
        """Set the live replicas and how many requests each takes."""
        for name, limit in limits.items():
            self._replicas.setdefault(name, _Replica(limit)).limit = limit
        for name in self._replicas.keys() - limits.keys():
            self._replicas[name].limit = 0
            if not self._replicas[name].ours:
                del self._replicas[name]
        self._hand_out()

    async def take(self, key: str, order: tuple[bool, float], choose: Choose) -> str | None:
        """The replica at which the request `key` has a place from now on; None when there is no replica.

        Requests with a lower `order` come first. A request that asks again was refused by the replica of its place.
        """
        if (place := self._places.get(key)) is not None:
            self._free(key)
            if not place.accepted:
                replica = place.replica
                replica.others = max(replica.others, replica.limit - replica.ours)
        waiter = _Waiter(order, key, choose, asyncio.get_running_loop().create_future())
        insort(self._waiters, waiter, key=lambda one: one.order)  # behind those of the same order
        self._hand_out()
        try:
            return await waiter.found
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self.unsent(key)
            raise

    def sent(self, key: str) -> None:
        """The request is on its way to the replica of its place."""
        if (place := self._places.get(key)) is not None:
            place.sent = True

    def unsent(self, key: str) -> None:
        """The request was given up. Its place is free if it was not sent; otherwise `completed` says so."""
        if (place := self._places.get(key)) is not None and not place.sent:
            self.completed(key)

    def told(self, name: str, ongoing: int) -> None:
        """The replica answered a request: it has `ongoing` ones, including that one if it accepted it."""
        if (replica := self._replicas.get(name)) is not None:
            replica.others = max(0, ongoing - replica.accepted)

    def accepted(self, key: str) -> None:
        """The request's replica has accepted it; `told` was called for the same answer just before."""
        if (place := self._places.get(key)) is not None and not place.accepted:
            place.accepted = True
            place.replica.accepted += 1
            place.replica.others = max(0, place.replica.others - 1)
            self._failures = 0

    def completed(self, key: str) -> None:
        """The request has left its replica, or never came to it."""
        if key in self._places:
            self._free(key)
            self._hand_out()

    def _free(self, key: str) -> None:
        place = self._places.pop(key)
        place.replica.ours -= 1
        place.replica.accepted -= place.accepted

    def _room(self, replica: _Replica) -> int:
        return replica.limit - replica.ours - replica.others - self._left_to_others(replica)

    def _left_to_others(self, replica: _Replica) -> int:
        return int(self._shared and replica.ours > 0)

    def _hand_out(self) -> None:
        """Give the free places to the waiting requests, in their order."""
        alive = any(replica.limit for replica in self._replicas.values())
        for waiter in list(self._waiters):
            load = {name: one.ours + one.others for name, one in self._replicas.items() if self._room(one) > 0}
            if alive and not load:
                break
            chosen = waiter.choose(load) if load else None
            if chosen is not None:
                replica = self._replicas[chosen]
                replica.ours += 1
                self._places[waiter.key] = _Place(replica)
            elif alive:
                continue
            self._waiters.remove(waiter)
            if not waiter.found.done():
                waiter.found.set_result(chosen)
        if self._timer is not None and not self._waiters:
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and self._waiters:
            pause_s = backoff_s(self._failures + 1, FIRST_PAUSE_S, MAX_PAUSE_S)
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._try_again)

    def _try_again(self) -> None:
        """Let one request try each replica whose places others seem to hold."""
        self._timer = None
        self._failures += 1
        for replica in self._replicas.values():
            one_free = replica.limit - replica.ours - self._left_to_others(replica) - 1
            replica.others = min(replica.others, max(0, one_free))
        self._hand_out()
