"""Measures how fast a replica works, and decides which news of its load is worth a message.

Rates are means over recent busy time: time in which nothing is computed changes nothing. Knows no clock.
"""

from __future__ import annotations

import math

from serve_app.core import ReplicaLoad

RECENT_S = 3.0
"""Busy time after which a step counts for 1/e of its tokens and seconds."""
RECENT_REQUESTS = 8
"""Each request that ends counts for one of so many in the mean time per request."""
CHANGE = 1 / 8
"""News are a number of requests that changed, or another number that changed by this fraction."""


class LoadMeter:
    """The rates of one engine, from the lengths of its steps and of its requests."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._seconds_per_request: float | None = None

    def step(self, seconds: float, tokens: int) -> None:
        """A step has taken so long and made so many output tokens."""
        kept = math.exp(-max(0.0, seconds) / RECENT_S)
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + max(0.0, seconds)

    def ended(self, seconds: float) -> None:
        """A request has ended, so long after its first step."""
        before = self._seconds_per_request
        self._seconds_per_request = seconds if before is None else before + (seconds - before) / RECENT_REQUESTS

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests together; 0 until it is known."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    @property
    def seconds_per_request(self) -> float:
        """From a request's first step to its end; 0 until it is known."""
        return self._seconds_per_request or 0.0


def is_news(load: ReplicaLoad, told: ReplicaLoad | None) -> bool:
    """Whether `load` differs so much from what was `told` last that it should be told again.

    Free pages and rates change a little with each step: told each time, they would cost a message a step.
    """
    if told is None or (load.running, load.waiting, load.places) != (told.running, told.waiting, told.places):
        return True
    return (
        _changed(load.free_tokens, told.free_tokens)
        or _changed(load.waiting_tokens, told.waiting_tokens)
        or _changed(load.tokens_per_s, told.tokens_per_s)
        or _changed(load.seconds_per_request, told.seconds_per_request)
    )


def _changed(now: float, before: float) -> bool:
    return abs(now - before) > CHANGE * max(now, before)
