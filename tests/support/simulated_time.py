"""Time that passes only when nothing else is left to do: tests of timeouts that a stall of the machine can't break.

For tests whose every wait is one of the event loop's. A thread, a process or a socket would find that time jumps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ITERATION_S = 1e-6
"""Of the loop, which takes some time too: code that asks again until a moment is over must see it pass."""
_STUCK_S = 10.0
"""With no timer left only a thread could wake the loop; after so long nothing will."""


@contextmanager
def simulated_time() -> Iterator[None]:
    """Within the block the running loop's clock jumps to the next timer instead of waiting for it."""
    loop: Any = asyncio.get_running_loop()
    selector, real_select = loop._selector, loop._selector.select
    now_s = loop.time()

    def select(timeout: float | None = None) -> Any:
        nonlocal now_s
        now_s += _ITERATION_S
        if timeout is None:
            ready = real_select(_STUCK_S)
            if not ready:
                raise RuntimeError("all tasks wait, and nothing is left that could wake one")
            return ready
        ready = real_select(0)
        if not ready:
            now_s += timeout
        return ready

    loop.time, selector.select = lambda: now_s, select
    try:
        yield
    finally:
        del loop.time, selector.select
