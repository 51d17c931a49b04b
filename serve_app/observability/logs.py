"""The access log: one line for each request, with its id, when it ends.

Promises that no line holds a prompt, an answer or the value of a key, and that a flood of requests that are refused
floods no log. Imports no other room.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from time import monotonic

request_id_var: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that the running task works for; "-" outside of any."""

access_logger = logging.getLogger("serve_app.access")

DISCONNECTED = 499
"""The status in the access line of a client that went before its answer began (nginx's number for it)."""
_CUT_OFF = "disconnected"
NOBODY = "-"
"""The key and the tenant of a request without a key."""


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request, filled in while it is served and read once when it has ended.

    Times are of `time.monotonic`, in seconds.
    """

    request_id: str
    endpoint: str = "-"
    key: str = NOBODY
    """The name of the caller's key."""
    tenant: str = NOBODY
    """The tenant that the key belongs to."""
    status: int = DISCONNECTED
    """Of the HTTP response; stays `DISCONNECTED` when none was begun."""
    outcome: str = _CUT_OFF
    """A finish reason or an error's code; for a request with neither, "ok", "refused" or "disconnected"."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    ignored_fields: list[str] = field(default_factory=list)
    """Names of the request's unknown fields, made safe for a header."""
    clamped_fields: dict[str, int] = field(default_factory=dict)
    """Fields whose value was too large -> the value used instead."""
    limit_headers: dict[str, str] = field(default_factory=dict)
    """Headers that tell what is left of the caller's limits."""
    arrived: float = field(default_factory=monotonic)
    first_token: float | None = None
    last_token: float | None = None

    def saw_tokens(self, count: int) -> None:
        """Count tokens that have just come from the model."""
        self.last_token = monotonic()
        if self.first_token is None:
            self.first_token = self.last_token
        self.output_tokens += count

    def sent_whole(self) -> None:
        """The whole response was sent, so a request that has no outcome yet was not cut off."""
        if self.outcome == _CUT_OFF:
            self.outcome = "ok" if self.status < 400 else "refused"

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from arrival to the first token; None when there was none."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def inter_token_latency_s(self) -> float | None:
        """Mean seconds between tokens; None with fewer than two."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.output_tokens - 1)


MOST_REFUSALS = 20
"""Lines of refused requests within `REFUSALS_S`; the others are counted in one line."""
REFUSALS_S = 1.0
_REFUSED = (401, 403, 429, 503)
"""A client that is refused with one of these may ask again at once, as often as it can."""


class AccessLog:
    """The access log of one process. Used from its event loop."""

    def __init__(self) -> None:
        self._refused = 0
        """In this interval."""
        self._left_out: Counter[tuple[str, int, str]] = Counter()
        """(endpoint, status, outcome) -> requests in this interval without a line of their own."""
        self._interval: asyncio.TimerHandle | None = None

    def ended(self, record: RequestRecord) -> None:
        """Write the line of a request that has ended, or count it."""
        if record.status not in _REFUSED:
            log_access(record)
            return
        if self._interval is None:
            # In a context of its own: the line of the count must not carry this request's id.
            loop = asyncio.get_running_loop()
            self._interval = loop.call_later(REFUSALS_S, self._next_interval, context=Context())
        self._refused += 1
        if self._refused <= MOST_REFUSALS:
            log_access(record)
        else:
            self._left_out[record.endpoint, record.status, record.outcome] += 1

    def _next_interval(self) -> None:
        for (endpoint, status, outcome), count in self._left_out.items():
            access_logger.info("refused=%d more endpoint=%s status=%d outcome=%s", count, endpoint, status, outcome)
        self._left_out.clear()
        self._refused, self._interval = 0, None


def log_access(record: RequestRecord, level: int = logging.INFO) -> None:
    """Write the one line of a request that has ended."""
    ttft_s = record.time_to_first_token_s
    access_logger.log(
        level,
        "request_id=%s endpoint=%s status=%d outcome=%s prompt_tokens=%d cached_prompt_tokens=%d output_tokens=%d"
        " ttft_s=%s duration_s=%.3f key=%s tenant=%s ignored_fields=%s",
        record.request_id,
        record.endpoint,
        record.status,
        record.outcome,
        record.prompt_tokens,
        record.cached_prompt_tokens,
        record.output_tokens,
        "-" if ttft_s is None else f"{ttft_s:.3f}",
        monotonic() - record.arrived,
        record.key,
        record.tenant,
        ",".join(record.ignored_fields) or "-",
    )
