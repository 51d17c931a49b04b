"""What the guard costs a request, in CPU time of the ingress: `python -m loadtest.guard_cost [--keys 1000]`.

Times the look-up of a right key, of a wrong one, and of none, as the middleware does them, and the counting of a
request whose key and tenant have all limits, headers included; without a server around.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers

from serve_app.access.caller import Caller, Limits
from serve_app.access.keys import VARIABLE, ApiKeys, new_key
from serve_app.access.memory_quotas import MemoryQuotas, MemoryQuotaStore
from serve_app.access.quotas import Message, QuotaStore, encode_answers
from serve_app.access.reservations import Quotas
from serve_app.access.shared_quotas import SharedQuotas
from serve_app.api.errors import ApiError
from serve_app.api.http.guard import Guard
from serve_app.api.limit_headers import openai_headers
from serve_app.observability.metrics import NO_TAGS, Metric

ROUNDS = 20_000


def cost_us(work: Callable[[], object]) -> float:
    """CPU time of one call, in microseconds."""
    start = time.process_time()
    for _ in range(ROUNDS):
        work()
    return (time.process_time() - start) / ROUNDS * 1e6


class _NoMetrics:
    def count(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None: ...

    def gauge(self, metric: Metric, value: float, tags: Mapping[str, str] = NO_TAGS) -> None: ...

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None: ...


async def limits_us(store: QuotaStore) -> float:
    """CPU time of one request with all limits, in microseconds, from its arrival to its end."""
    limits = Limits(requests_per_minute=10**9, tokens_per_minute=10**9, tokens_per_day=10**12, streams=10**6)
    caller = Caller(name="me", tenant="us", limits=limits, tenant_limits=limits)
    quotas = Quotas(store, _NoMetrics())
    start = time.process_time()
    for _ in range(ROUNDS):
        reservation = quotas.reservation(caller)
        assert reservation is not None
        reservation.check()
        await reservation.take(1000, stream=True)
        openai_headers(reservation)
        reservation.end(500)
    spent = time.process_time() - start
    await quotas.aclose()
    return spent / ROUNDS * 1e6


def shared_store() -> QuotaStore:
    """As several ingress replicas share one, with the counting and without the transport."""
    counters = MemoryQuotas(lease_s=30)

    async def carry(package: bytes, messages: list[Message]) -> bytes:
        return encode_answers([counters.perform(message) for message in messages])

    async def close() -> None: ...

    return SharedQuotas(carry, close)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1000)
    key = new_key()
    others = (f"key{number}={new_key()}" for number in range(1, parser.parse_args().keys))
    guards = {
        "a right key": Guard(ApiKeys(environment={VARIABLE: " ".join([*others, f"me={key}"])})),
        "no keys asked for": Guard(),
    }
    guards["a wrong key"] = guards["a right key"]
    for name, guard in guards.items():
        presented = f"Bearer {new_key() if name == 'a wrong key' else key}".encode()
        headers = [(b"host", b"localhost"), (b"authorization", presented), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "client": ("203.0.113.7", 1), "headers": headers}

        def ask(guard: Guard = guard, scope: dict[str, object] = scope) -> None:
            with contextlib.suppress(ApiError):
                guard.caller(scope, "/v1/chat/completions", Headers(scope=scope))

        print(f"{name}: {cost_us(ask):.1f} us of CPU a request")
    print(f"limits, one ingress: {asyncio.run(limits_us(MemoryQuotaStore())):.1f} us of CPU a request")
    print(f"limits, several ingresses: {asyncio.run(limits_us(shared_store())):.1f} us of CPU, without the transport")


if __name__ == "__main__":
    main()
