"""Callers with limits, and what tests see of their counters."""

from __future__ import annotations

from dataclasses import replace

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.access.caller import ANONYMOUS, Caller, Limits
from serve_app.access.memory_quotas import MemoryQuotas
from serve_app.access.quotas import Ask, Demand, Measure
from serve_app.api.http.guard import Guard

_WHO = "test.caller"

NOON_S = 1_900_000_800.0
"""The beginning of a minute, and no beginning of a day."""


class Clock:
    """Time that a test sets."""

    def __init__(self, now_s: float = NOON_S) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def caller(tenant: Limits | None = None, name: str = "laptop", **limits: int) -> Caller:
    """caller(requests_per_minute=3): with these limits of its key."""
    made = Caller(name=name, tenant="office", limits=Limits(**limits))
    return made if tenant is None else replace(made, tenant_limits=tenant)


class TrustingGuard(Guard):
    """In place of keys: takes everybody for who `as_caller` says."""

    def caller(self, scope: Scope, path: str, headers: Headers) -> Caller:
        who: Caller = scope.get(_WHO, ANONYMOUS)
        return who


def as_caller(app: ASGIApp, who: Caller) -> ASGIApp:
    """The application, which has a `TrustingGuard`; every request comes from `who`."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope[_WHO] = who
        await app(scope, receive, send)

    return call


def used(quotas: MemoryQuotas, subject: str = "key laptop") -> dict[str, int]:
    """What counts now, by what is counted."""
    everything = Demand(subject, 10**9, 10**9, 10**9, 10**9)
    uses = quotas.perform(Ask("probe", (Demand("nobody", 0), everything)))  # refused, so that it counts nothing
    return {Measure(use.measure).name.lower(): use.used for use in uses if use.subject == 1}
