"""The headers that tell a caller what is left of its limits, for OpenAI's clients and for Anthropic's.

Sources: platform.openai.com/docs/guides/rate-limits, docs.claude.com/en/api/rate-limits. Both name one limit for
requests and one for tokens, so that of several the one with the least left is told. Knows no store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from serve_app.access.quotas import Measure
from serve_app.access.reservations import Reservation

OPENAI_NAMES = tuple(
    f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
ANTHROPIC_NAMES = tuple(
    f"anthropic-ratelimit-{kind}-{what}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
_KINDS: Mapping[str, tuple[Measure, ...]] = {
    "requests": (Measure.REQUESTS,),
    "tokens": (Measure.TOKENS, Measure.TOKENS_DAY),
}


@dataclass(frozen=True, slots=True)
class _Left:
    """What is left of one limit."""

    most: int
    remaining: int
    reset_s: float


def openai_headers(reservation: Reservation) -> dict[str, str]:
    """OpenAI's, with its durations, such as 6m0s."""
    return _written(reservation, "x-ratelimit-{what}-{kind}", duration)


def anthropic_headers(reservation: Reservation) -> dict[str, str]:
    """Anthropic's, with moments as RFC 3339 writes them."""
    return _written(reservation, "anthropic-ratelimit-{kind}-{what}", _moment)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s, 23h59m8s. To the millisecond."""
    ms = max(0, round(seconds * 1000))
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _moment(seconds: float) -> str:
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _written(reservation: Reservation, name: str, written: Callable[[float], str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for kind, measures in _KINDS.items():
        if (left := _tightest(reservation, measures)) is not None:
            values = (("limit", str(left.most)), ("remaining", str(left.remaining)), ("reset", written(left.reset_s)))
            headers |= {name.format(what=what, kind=kind): value for what, value in values}
    return headers


def _tightest(reservation: Reservation, measures: tuple[Measure, ...]) -> _Left | None:
    """The limit with the least left, of those that count one of `measures`."""
    lefts = [
        _Left(use.most, max(0, use.most - use.used - reservation.cost(use.measure)), use.reset_s)
        for use in reservation.uses
        if use.measure in measures
    ]
    return min(lefts, key=lambda left: left.remaining, default=None)
