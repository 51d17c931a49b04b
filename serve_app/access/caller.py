"""Who asks: the holder of a key, the tenant it belongs to, and what both are allowed.

Knows no secret: a caller is made when a key has been checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key or a tenant may use. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers together."""
    tokens_per_day: int | None = None
    streams: int | None = None
    """Requests in progress at once, those that wait included."""
    context_tokens: int | None = None
    """Longest prompt and answer of one request together."""
    answer_tokens: int | None = None
    """Longest answer of one request, for each of its choices."""


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The holder of one key."""

    name: str
    """The key's name, for logs and metrics; it is no secret."""
    tenant: str
    """Keys of one tenant share its limits, its cached prefixes, its streams and its place in the queue."""
    admin: bool = False
    models: frozenset[str] | None = None
    """Names of the models that it may use. None: all."""
    priorities: frozenset[Priority] = frozenset(Priority)
    """Classes that it may ask for."""
    limits: Limits = NO_LIMITS
    tenant_limits: Limits = NO_LIMITS
    """Of all keys of the tenant together."""
    weight: float = 1.0
    """The tenant's share of the service, relative to the shares of other tenants that ask at the same time."""


ANONYMOUS = Caller(name="", tenant="")
"""Everybody, where the service asks for no keys."""
