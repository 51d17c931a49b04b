"""Where the requests of one router wait until a replica has a place for them.

Promises that they wake in the order of `access.admission` when a place is free, and that a waiting request asks no
replica, unless other routers hold its places and nothing tells when they give one back. Knows no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_app.access.admission import Admission
from serve_app.access.entry import Entry
from serve_app.backoff import backoff_s

FIRST_PAUSE_S = 0.05
"""Pause before another try at a replica whose places other routers hold: they don't tell when they free one. The
replica may also need some milliseconds to notice that one of our requests was cancelled."""
MAX_PAUSE_S = 1.0
"""The pause doubles up to this, until a request is accepted."""

Choose = Callable[[Mapping[str, int]], str | None]
"""Replicas that have room -> their numbers of requests; returns one of them, or None if the request should wait."""


@dataclass(slots=True)
class _Place:
    entry: Entry
    stray: bool
    sent: bool = False
    accepted: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    key: str
    stray: bool
    choose: Choose
    found: asyncio.Future[str | None]


class Places:
    """The places and the waiting requests of one router, on its event loop."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._capacity = admission.capacity
        self._places: dict[str, _Place] = {}
        self._waiters: dict[Entry, _Waiter] = {}
        self._failures = 0
        self._timer: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looks = False
        admission.changed = self._look

    def update(self, limits: Mapping[str, int]) -> None:
        """Set the live replicas and how many requests each takes."""
        self._admission.update(limits)
        self._hand_out()

    async def take(self, key: str, request: object, choose: Choose) -> str | None:
        """The replica at which the request `key` has a place from now on; None when there is no replica.

        A request that asks again was refused by the replica of its place: it is the next to get one.
        """
        self._loop = asyncio.get_running_loop()
        admission = self._admission
        with admission.lock:
            if (place := self._places.get(key)) is not None:
                if not place.accepted:
                    self._capacity.rejected(place.entry)
                self._free(key)
                entry, stray = place.entry, place.stray
                admission.come_back(entry)
            else:
                found = admission.find(request)
                entry, stray = (admission.stray(request), True) if found is None else (found, False)
                if entry.placed_at is not None:  # it had a place, and its replica died before it had the request
                    admission.come_back(entry)
        waiter = self._waiters[entry] = _Waiter(key, stray, choose, self._loop.create_future())
        self._hand_out()
        try:
            return await waiter.found
        except asyncio.CancelledError:
            if self._waiters.pop(entry, None) is None:
                self.unsent(key)
            elif stray:
                admission.leave(entry)
            raise

    def sent(self, key: str) -> None:
        """The request is on its way to the replica of its place."""
        if (place := self._places.get(key)) is not None and not place.sent:
            place.sent = True
            with self._admission.lock:
                self._capacity.sent(place.entry)

    def unsent(self, key: str) -> None:
        """The request was given up. Its place is free if it was not sent; otherwise `completed` says so."""
        if (place := self._places.get(key)) is not None and not place.sent:
            self.completed(key)

    def told(self, name: str, ongoing: int) -> None:
        """The replica answered a request: it has `ongoing` ones, including that one if it accepted it."""
        with self._admission.lock:
            self._capacity.told(name, ongoing)

    def accepted(self, key: str) -> None:
        """The request's replica has accepted it; `told` was called for the same answer just before."""
        if (place := self._places.get(key)) is not None and not place.accepted:
            place.accepted = True
            with self._admission.lock:
                self._capacity.accepted(place.entry)
            self._failures = 0

    def completed(self, key: str) -> None:
        """The request has left its replica, or never came to it."""
        if (place := self._places.get(key)) is not None:
            self._free(key)
            if place.stray:
                self._admission.leave(place.entry)
            self._hand_out()

    def _free(self, key: str) -> None:
        place = self._places.pop(key)
        with self._admission.lock:
            self._admission.give_back(place.entry, sent=place.sent)

    def _look(self) -> None:
        """Hand out soon. Called on any thread."""
        if self._loop is not None and self._waiters and not self._looks:
            self._looks = True
            try:
                self._loop.call_soon_threadsafe(self._look_now)
            except RuntimeError:  # the router's loop is closed: nobody waits there any more
                self._looks = False

    def _look_now(self) -> None:
        self._looks = False
        self._hand_out()

    def _hand_out(self) -> None:
        """Give the free places to the waiting requests, in their order."""
        admission = self._admission
        with admission.lock:
            if not self._capacity.open:
                for entry in list(self._waiters):
                    self._wake(entry, None)
                return
            admission.blocked = False
            for _ in admission.rounds():
                for lane in admission.turns.lanes():
                    for entry in lane:
                        if not self._give_place(entry):
                            break
            doubtful = bool(self._waiters) and self._capacity.doubtful()
        if self._timer is not None and not doubtful:
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and doubtful:
            pause_s = backoff_s(self._failures + 1, FIRST_PAUSE_S, MAX_PAUSE_S)
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._try_again)

    def _give_place(self, entry: Entry) -> bool:
        """Give the entry a place, if its router waits for one and there is one for it. Returns whether it is the turn
        of the next one then."""
        waiter = self._waiters.get(entry)
        if waiter is None:
            return False  # it has just come, and will ask at once
        request = entry.request
        leaves = 0 if request is None else self._admission.leaves(request.tenant, request.weight)
        rooms = self._capacity.rooms(entry, leaves=leaves)
        chosen = waiter.choose(rooms) if rooms else None
        if chosen is None:
            if self._capacity.free(entry.priority, leaves=leaves) > 0:
                self._admission.blocked = True
                return False
            return self._admission.several_tenants
        self._admission.place(entry, chosen)
        self._places[waiter.key] = _Place(entry, waiter.stray)
        self._wake(entry, chosen)
        return True

    def _wake(self, entry: Entry, replica: str | None) -> None:
        waiter = self._waiters.pop(entry)
        if replica is None and waiter.stray:
            self._admission.leave(entry)  # it comes anew when there are replicas
        if not waiter.found.done():
            waiter.found.set_result(replica)

    def _try_again(self) -> None:
        """Let one request try each replica whose places others seem to hold."""
        self._timer = None
        self._failures += 1
        with self._admission.lock:
            self._capacity.try_again()
        self._hand_out()
