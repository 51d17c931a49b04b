"""How long requests take from their place in a replica's step to their end, as far as an ingress has seen it.

Learns from the requests that have ended here and, until then, from what the replicas report. Pure: knows no clock and
no thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.core import ReplicaLoad

START_S_PER_TOKEN = 0.05
"""What a token of an answer takes until that is known: as fast as people read, which few services are when full."""
NEWEST_SHARE = 0.05
"""Weight of a request that has just ended, in the averages: they follow the last 20 or so."""
FULL_SHARE = 0.75
"""With so many of its places taken a service counts as full: its tokens take as long as they do under load."""
SETTLED_S = 3.0
"""A report's `tokens_per_s` counts after the service has been full for so long: it is an average over some seconds."""


class Pace:
    """Averages over the requests of one ingress, on the replicas of one deployment."""

    def __init__(self) -> None:
        self._s_per_token: float | None = None
        """When the service is full: only then does anybody wait."""
        self._s_per_token_now: float | None = None
        self._full_since: float | None = None

    def ended(self, seconds: float, tokens: int, *, full: bool) -> None:
        """A request has ended `seconds` after it got its place, with `tokens` new tokens."""
        if tokens > 0 and full:
            self._s_per_token = _average(self._s_per_token, seconds / tokens)
        elif tokens > 0:
            self._s_per_token_now = seconds / tokens

    def reported(self, loads: Iterable[ReplicaLoad], now: float) -> None:
        """The newest reports of all replicas."""
        running = places = 0
        tokens_per_s = 0.0
        for load in loads:
            if load.tokens_per_s > 0:
                running += load.running
                places += load.places
                tokens_per_s += load.tokens_per_s
        if running == 0 or running < FULL_SHARE * places:
            self._full_since = None
            if running:
                self._s_per_token_now = running / tokens_per_s
            return
        self._full_since = now if self._full_since is None else self._full_since
        if now - self._full_since >= SETTLED_S:
            self._s_per_token = _average(self._s_per_token, running / tokens_per_s)

    @property
    def s_per_token(self) -> float:
        """Seconds that an answer takes for each of its tokens when the service is full, its prompt included."""
        return self._s_per_token or self._s_per_token_now or START_S_PER_TOKEN


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + NEWEST_SHARE * (value - before)
