"""What passes between an ingress and the store that counts what callers use.

A request asks once, with all that it may use, and settles when it has ended. Until then it holds a lease: its place
among its caller's streams at once, and the right to give tokens back. A lease that nobody renews expires, so an ingress
that dies leaves no place taken; the tokens of its requests stay counted.

Each message may be repeated: a lease is taken once, and settled once. Knows no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import msgspec
from msgspec import Struct

from serve_app.access.caller import Caller, Limits

LEASE_S = 30.0
"""A lease of a shared store expires so long after it was taken or renewed."""
STREAM_WAIT_S = 1.0
"""How long a request is told to wait for the end of another: nobody knows."""


class Measure(IntEnum):
    """What a limit counts, in the order in which a `Demand` has its limits."""

    REQUESTS = 0
    TOKENS = 1
    TOKENS_DAY = 2
    STREAMS = 3


class Demand(Struct, frozen=True, array_like=True):
    """The limits of one key, or of one tenant. None: no limit."""

    subject: str
    """Whose counters they are."""
    requests: int | None = None
    """A minute."""
    tokens: int | None = None
    """A minute."""
    tokens_day: int | None = None
    streams: int | None = None

    def most(self, measure: Measure) -> int | None:
        """The limit of what `measure` counts."""
        return (self.requests, self.tokens, self.tokens_day, self.streams)[measure]


class Ask(Struct, frozen=True, array_like=True, tag="ask"):
    """One request wants to begin: all of its limits must have room, or nothing is counted."""

    lease: str
    demands: tuple[Demand, ...]
    tokens: int = 0
    """Of its prompts and its longest answers."""
    stream: bool = False
    """It generates: it takes a place among the streams, and will settle."""


class Settle(Struct, frozen=True, array_like=True, tag="settle"):
    """A request has ended. What it did not use is given back."""

    lease: str
    subjects: tuple[str, ...]
    used_tokens: int


class Renew(Struct, frozen=True, array_like=True, tag="renew"):
    """These requests still run. A lease that has expired stays so."""

    leases: tuple[str, ...]
    subjects: tuple[str, ...]
    """Of all these leases."""


class Use(Struct, frozen=True, array_like=True):
    """One limit as a request finds it."""

    subject: int
    """The number of its `Demand`."""
    measure: Measure
    most: int
    used: int
    """Without the request."""
    reset_s: float
    """Seconds until nothing counts any more, the request included."""
    wait_s: float = 0.0
    """Seconds until the request fits; 0 if it does."""


Message = Ask | Settle | Renew
Answer = list[Use]
"""All limits of the request. It is refused if one of them has a `wait_s`."""

_MESSAGES = msgspec.msgpack.Decoder(list[Message])
_ANSWERS = msgspec.msgpack.Decoder(list[Answer])


def encode(messages: Sequence[Message]) -> bytes:
    """Messages for a store outside of this process."""
    return msgspec.msgpack.encode(messages)


def decode(content: bytes) -> list[Message]:
    """What `encode` has written."""
    return _MESSAGES.decode(content)


def encode_answers(answers: Sequence[Answer]) -> bytes:
    """A store's answers, one for each message; an empty one for a message that is no `Ask`."""
    return msgspec.msgpack.encode(answers)


def decode_answers(content: bytes) -> list[Answer]:
    """What `encode_answers` has written."""
    return _ANSWERS.decode(content)


class QuotaUnavailable(Exception):
    """The store can't be reached now."""


class QuotaStore(Protocol):
    """Counts what callers use. Messages of one ingress are handled in order."""

    lease_s: float | None
    """Leases that are not renewed expire after so long. None: they don't expire."""

    async def ask(self, ask: Ask) -> Answer:
        """Count a request, or refuse it. Raises `QuotaUnavailable`."""
        ...

    def tell(self, message: Settle | Renew) -> None:
        """Pass a message on, at some time soon."""
        ...

    async def aclose(self) -> None:
        """Send what is left, and let go of connections."""
        ...


def demands_of(caller: Caller) -> tuple[Demand, ...]:
    """The limits that are counted for this caller's requests: of its key, then of its tenant. () if it has none."""
    return tuple(
        demand
        for kind, name, limits in (("key", caller.name, caller.limits), ("tenant", caller.tenant, caller.tenant_limits))
        if (demand := _demand(f"{kind} {name}", limits)) is not None
    )


def _demand(subject: str, limits: Limits) -> Demand | None:
    counted = (limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day, limits.streams)
    return None if counted == (None, None, None, None) else Demand(subject, *counted)
