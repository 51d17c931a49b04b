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

from serve_app.access.admission import Admission
from serve_app.core import Fingerprint, GenerationRequest
from serve_app.deployments.dispatch.channel_wire import ChannelAddress

SILENT_FOR_S = 60.0
"""How long a replica that fell silent or is out of order gets no requests, if there is another, unless it sends
something again. Serve takes three failed health checks to replace it."""
MOVING_AT_ONCE = 2
"""Streams that leave draining replicas at the same time; the others go on there meanwhile. If all left at once, each
would wait while the prompts of all are computed again."""
MOVE_S = 10.0
"""A stream that has not arrived after this long no longer keeps others from moving."""


@dataclass(slots=True, eq=False)
class Attempt:
    """Where one attempt is: at no replica as long as it waits for a place."""

    request: GenerationRequest
    replica: str | None = None
    """The id of the replica that the attempt was sent to."""
    left: str | None = None
    """While the attempt waits for another replica: the one that it was sent to before."""
    taken: bool = False
    """`replica` is known to have accepted the attempt. Until then Serve may send it to another one."""
    call: object = None
    """Serve's call once the attempt is taken, to cancel it by."""
    sendings: int = 0
    """How often the router has handed the attempt to a replica."""
    begun: int | None = None
    """The value of `sendings` when its first reply came through a channel; None: none has come."""
    deaths: int = 0
    """Number of replicas that died while the attempt was on its way to them."""

    @property
    def stream(self) -> tuple[str, int]:
        """(request id, choice): the same for all attempts of one choice."""
        return self.request.request_id, self.request.choice


class ReplicaDirectory:
    """The replicas of one deployment as this process knows them, and its attempts on them.

    The router's thread calls `update`, `sent`, `taken`, `died` and `waiting`, the ingress's loop the rest. Each step is
    a single assignment or dictionary operation, so that no lock is needed.
    """

    def __init__(self) -> None:
        self.live: Mapping[str, Fingerprint | None] = {}
        """Replicas that take requests, with their weights. A draining one is not among them."""
        self.admission = Admission()
        """The requests that wait for these replicas."""
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
        """Set what the router knows of each replica: its weights' fingerprint, its `numerics_id` if it is
        batch-invariant, and the address of its token channels."""
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
        """Have `listener` called after each `update`, on the thread of that `update`."""
        self._listeners.append(listener)

    def channel(self, replica: str) -> ChannelAddress | None:
        """The address of a live replica's token channels; None if it has none."""
        return ChannelAddress.parse(self._channels.get(replica, ""))

    @contextmanager
    def track(self, request: GenerationRequest) -> Iterator[Attempt]:
        """Track `request`, by the object's identity, from before it is sent until it has ended."""
        attempt = self._attempts[id(request)] = Attempt(request)
        try:
            yield attempt
        finally:
            self.forget(attempt)

    def forget(self, attempt: Attempt) -> None:
        """Stop tracking an attempt that was given up or has ended. For one that is accepted later, `taken` is False."""
        self._attempts.pop(id(attempt.request), None)

    def sent(self, request: object, replica: str) -> None:
        """The router has handed `request` to this replica, which may still reject it."""
        if (attempt := self._attempts.get(id(request))) is not None:
            attempt.taken = False
            attempt.left = None
            attempt.replica = replica  # before `sendings`: no reply of an earlier replica counts as this sending's
            attempt.sendings += 1

    def taken(self, request: object, replica: str, call: object) -> bool:
        """The replica has accepted `request`. False if the attempt was given up: the router must then cancel `call`.

        Serve cancels nothing if that happens after Serve got the replica's answer and before Serve's caller did.
        """
        attempt = self._attempts.get(id(request))
        if attempt is not None:
            attempt.replica = replica
            attempt.call = call
            attempt.taken = True
            # The replica client calls `forget` before it looks for `call`, so one of the two cancels the call.
            return id(request) in self._attempts
        return not (isinstance(request, GenerationRequest) and request.attempt)

    def died(self, replica: str) -> None:
        """The router met a dead replica. Attempts that it had not accepted yet wait for another one."""
        for attempt in list(self._attempts.values()):
            if not attempt.taken and replica in (attempt.replica, attempt.left):
                attempt.replica = attempt.left = None
                attempt.deaths += 1

    def waiting(self, request: object) -> None:
        """The router is looking for a replica for `request`."""
        if (attempt := self._attempts.get(id(request))) is not None and attempt.replica is not None:
            attempt.left = attempt.replica
            attempt.replica = None

    def heard(self, attempt: Attempt, *, tokens: bool) -> None:
        """The attempt's replica has sent a reply, with `tokens` or without."""
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
        """Note that a replica has sent an attempt nothing for `for_s`, which is longer than a live replica is silent.

        False if it was not silent after all: it has sent something to another attempt meanwhile.
        """
        now = time.monotonic()
        if now - self._heard_at.get(replica, -math.inf) < for_s:
            return False
        self._silent_until[replica] = now + SILENT_FOR_S
        return True

    def out_of_order(self, attempt: Attempt) -> None:
        """The attempt's replica can compute nothing more. Send it no requests: being idle, it would be chosen first."""
        if attempt.replica is not None:
            self._silent_until[attempt.replica] = time.monotonic() + SILENT_FOR_S

    def silent(self, replica: str) -> bool:
        """Whether this replica should get no requests for now."""
        until = self._silent_until.get(replica)
        return until is not None and time.monotonic() < until

    def should_leave(self, attempt: Attempt) -> bool:
        """Whether the attempt must leave: its replica is stopping and another can continue it. Asked per reply."""
        live, here = self.live, attempt.replica  # the router's thread may replace both meanwhile
        if here is None or here in live:
            return False
        if not any(self._continues(attempt, here, other, weights) for other, weights in live.items()):
            return False  # no other replica can continue it: it may finish here
        now = time.monotonic()
        self._moving_until = {stream: until for stream, until in self._moving_until.items() if until > now}
        if len(self._moving_until) >= MOVING_AT_ONCE:
            return False
        self._moving_until[attempt.stream] = now + MOVE_S
        return True

    def _continues(self, attempt: Attempt, here: str, other: str, weights: Fingerprint | None) -> bool:
        """Whether replica `other` has the attempt's weights and, if replica `here` has a `numerics_id`, the same one.

        If no replica has, the stream stays until its own is gone. Then any replica with its weights may continue it.
        """
        alike = self._numerics_ids.get(here, "")
        return (
            weights == attempt.request.fingerprint
            and not self.silent(other)
            and (not alike or self._numerics_ids.get(other) == alike)
        )


_tables: dict[tuple[str, str], ReplicaDirectory] = {}


def replica_directory(app_name: str, deployment_name: str) -> ReplicaDirectory:
    """This process's directory of one deployment. All its routers, one per handle, report the same to it."""
    return _tables.setdefault((app_name, deployment_name), ReplicaDirectory())
