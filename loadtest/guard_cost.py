"""What the guard costs a request, in CPU time of the ingress: `python -m loadtest.guard_cost [--keys 1000]`.

Times the look-up of a right key, of a wrong one, and of none, as the middleware does them, without a server around.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable

from starlette.datastructures import Headers

from serve_app.access.keys import VARIABLE, ApiKeys, new_key
from serve_app.api.errors import ApiError
from serve_app.api.http.guard import Guard

ROUNDS = 20_000


def cost_us(work: Callable[[], object]) -> float:
    """CPU time of one call, in microseconds."""
    start = time.process_time()
    for _ in range(ROUNDS):
        work()
    return (time.process_time() - start) / ROUNDS * 1e6


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


if __name__ == "__main__":
    main()
