"""The live model replicas as this process knows them, and the replica of each of its attempts.

Shared by the router, which Serve creates on an event loop of its own, and the replica client. Also decides when a
stream should leave a replica that is stopping. Knows no Ray and no text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.core import Fingerprint, GenerationRequest
from serve_app.deployments.dispatch.channel_wire import ChannelAddress

SILENT_FOR_S = 60.0
"""How long a replica that fell silent, or is out of order, gets no requests, if there is another and it says nothing
else. Serve takes three failed health checks to replace it."""
MOVING_AT_ONCE = 2
"""Streams that leave a draining replica together; the others go on there meanwhile. If all left at once, each would
wait while the prompts of all are computed again."""
MOVE_S = 10.0
"""A stream that has not arrived after this long no longer keeps others from moving."""


@dataclass(slots=True, eq=False)
class Attempt:
    """Where one attempt is: at no replica as long as it waits for a place."""

    request: GenerationRequest
    replica: str | None = None
    """The id of the replica that it was sent to."""
    left: str | None = None
    """The replica at which it was before it waited for another."""
    taken: bool = False
    """That replica is known to have it. As long as it isn't, Serve may send it to another."""
    call: object = None
    """Serve's, by which it can be cancelled then."""
    sendings: int = 0
    """How often the router has handed it to a replica."""
    begun: int | None = None
    """The sending of which tokens have come through a channel."""
    deaths: int = 0
    """Replicas that died when it was on its way to them."""

    @property
    def stream(self) -> tuple[str, int]:
        """What all attempts of one choice share."""
        return self.request.request_id, self.request.choice


class ReplicaDirectory:
    """The replicas of one deployment as this process knows them, and its attempts on them.

    The router's thread calls `update`, `sent`, `taken`, `died` and `waiting`, the ingress's loop the rest. Each step is
    a single assignment or dictionary operation, so that neither waits for the other.
    """

    def __init__(self) -> None:
        self.live: Mapping[str, Fingerprint | None] = {}
        """Replicas that take requests, with their weights. A draining one is not among them."""
        self._numerics_ids: Mapping[str, str] = {}
        self._channels: Mapping[str, str] = {}
        self._silent_until: dict[str, float] = {}
        self._heard_at: dict[str, float] = {}
        self._attempts: dict[int, Attempt] = {}
        self._moving_until: dict[tuple[str, int], float] = {}
        self._listeners: list[Callable[[], object]] = []

    def update(
        self,
        live: Mapping[str, Fingerprint | None],
        numerics_ids: Mapping[str, str] | None = None,
        channels: Mapping[str, str] | None = None,
    ) -> None:
        """What the router knows now of each replica: its weights, how it computes if it is batch-invariant, and where
        its token channels are had."""
        left = {attempt.replica for attempt in list(self._attempts.values())} - live.keys()
        known = {replica: how for replica, how in self._numerics_ids.items() if replica in left}
        self._numerics_ids = {**known, **(numerics_ids or {})}
        self._channels = channels or {}
        self.live = live
        for listener in list(self._listeners):
            try:
                listener()
            except RuntimeError:  # its event loop has been closed
                self._listeners.remove(listener)

    def subscribe(self, listener: Callable[[], object]) -> None:
        """Call this after each `update`, on whichever thread that is."""
        self._listeners.append(listener)

    def channel(self, replica: str) -> ChannelAddress | None:
        """Where token channels of a live replica are had; None where there are none."""
        return ChannelAddress.parse(self._channels.get(replica, ""))

    @contextmanager
    def track(self, request: GenerationRequest) -> Iterator[Attempt]:
        """Follow `request`, this very object, from before it is sent until it has ended."""
        attempt = self._attempts[id(request)] = Attempt(request)
        try:
            yield attempt
        finally:
            self.forget(attempt)

    def forget(self, attempt: Attempt) -> None:
        """It is given up, or has ended: from here on a replica's taking it is news to nobody."""
        self._attempts.pop(id(attempt.request), None)

    def sent(self, request: object, replica: str) -> None:
        """The router has handed it to this replica, which may still reject it."""
        if (attempt := self._attempts.get(id(request))) is not None:
            attempt.taken = False
            attempt.left = None
            attempt.replica = replica  # first: what an earlier one says from here on is not of this sending
            attempt.sendings += 1

    def taken(self, request: object, replica: str, call: object) -> bool:
        """This replica has it, and the router is done with it. False when it was given up: `call` is to be cancelled.

        Serve forgets to, where that happens between its taking note of the replica's answer and its caller's.
        """
        attempt = self._attempts.get(id(request))
        if attempt is not None:
            attempt.replica = replica
            attempt.call = call
            attempt.taken = True
            # Whoever gives it up looks for the call after that; one of the two sees what the other has done.
            return id(request) in self._attempts
        return not (isinstance(request, GenerationRequest) and request.attempt)

    def died(self, replica: str) -> None:
        """The router met a dead one. What that had not taken yet waits for another."""
        for attempt in list(self._attempts.values()):
            if not attempt.taken and replica in (attempt.replica, attempt.left):
                attempt.replica = attempt.left = None
                attempt.deaths += 1

    def waiting(self, request: object) -> None:
        """The router is looking for a replica."""
        if (attempt := self._attempts.get(id(request))) is not None and attempt.replica is not None:
            attempt.left = attempt.replica
            attempt.replica = None

    def heard(self, attempt: Attempt, *, tokens: bool) -> None:
        """Its replica has said something, if only that it is alive."""
        if attempt.replica is not None:
            now = time.monotonic()
            if attempt.replica not in self._heard_at:
                self._heard_at = {name: at for name, at in self._heard_at.items() if now - at < SILENT_FOR_S}
            self._heard_at[attempt.replica] = now
        if attempt.replica in self._silent_until:
            self._silent_until.pop(attempt.replica, None)
        if tokens and attempt.stream in self._moving_until:
            del self._moving_until[attempt.stream]

    def fell_silent(self, replica: str, for_s: float) -> bool:
        """This replica has said nothing to an attempt for so long, which is longer than a living one does.

        False when it was not silent: it has spoken to another attempt meanwhile.
        """
        now = time.monotonic()
        if now - self._heard_at.get(replica, -math.inf) < for_s:
            return False
        self._silent_until[replica] = now + SILENT_FOR_S
        return True

    def out_of_order(self, attempt: Attempt) -> None:
        """Its replica says that it can compute nothing more. Idle, it would be the first to be given what comes."""
        if attempt.replica is not None:
            self._silent_until[attempt.replica] = time.monotonic() + SILENT_FOR_S

    def silent(self, replica: str) -> bool:
        """Whether this replica should get no requests for now."""
        until = self._silent_until.get(replica)
        return until is not None and time.monotonic() < until

    def should_leave(self, attempt: Attempt) -> bool:
        """Whether its replica is going and another can continue it: asked after each reply. It must leave on True."""
        live, here = self.live, attempt.replica  # the router's thread may put others in their places meanwhile
        if here is None or here in live:
            return False
        if not any(self._continues(attempt, here, other, weights) for other, weights in live.items()):
            return False  # the last one: it may finish what it has
        now = time.monotonic()
        self._moving_until = {stream: until for stream, until in self._moving_until.items() if until > now}
        if len(self._moving_until) >= MOVING_AT_ONCE:
            return False
        self._moving_until[attempt.stream] = now + MOVE_S
        return True

    def _continues(self, attempt: Attempt, here: str, other: str, weights: Fingerprint | None) -> bool:
        """Whether another replica has the weights of an attempt, and computes as the one here does if that matters.

        Where none does, the stream stays until its replica is gone: then going on matters more than the last bit.
        """
        alike = self._numerics_ids.get(here, "")
        return (
            weights == attempt.request.fingerprint
            and not self.silent(other)
            and (not alike or self._numerics_ids.get(other) == alike)
        )


_tables: dict[tuple[str, str], ReplicaDirectory] = {}


def replica_directory(app_name: str, deployment_name: str) -> ReplicaDirectory:
    """This process's table of one deployment. Its routers, one per handle, say the same."""
    return _tables.setdefault((app_name, deployment_name), ReplicaDirectory())
