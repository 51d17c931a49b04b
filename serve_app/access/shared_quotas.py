"""A store outside of this process: messages of one tick go together, one package after the other.

Promises that a store is told in the order in which this process spoke, that what has ended is told again until the
store has heard it, and that a store that fails costs nobody a wait more than once a second. Knows no kind of store.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context

import msgspec

from serve_app.access.quotas import (
    LEASE_S,
    Answer,
    Ask,
    Message,
    QuotaUnavailable,
    Renew,
    Settle,
    decode_answers,
    encode,
)

RETRY_S = 1.0
"""After a failure nobody asks the store for so long."""
MAX_MESSAGES = 500
"""In one package."""
MAX_UNHEARD = 10_000
"""Most `Settle` messages that are kept for a store that can't be reached. The leases of more expire."""

_Waiting = tuple[Message, "asyncio.Future[Answer] | None"]


class SharedQuotas:
    """A `QuotaStore` over a function that carries a package to the store."""

    def __init__(
        self,
        carry: Callable[[bytes, list[Message]], Awaitable[bytes]],
        aclose: Callable[[], Awaitable[None]],
        lease_s: float = LEASE_S,
    ) -> None:
        """`carry`: from encoded messages, and the messages, to encoded answers. Raises `QuotaUnavailable`."""
        self.lease_s: float | None = lease_s
        self._carry = carry
        self._aclose = aclose
        self._waiting: deque[_Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._down_until = float("-inf")

    async def ask(self, ask: Ask) -> Answer:
        """See `QuotaStore`."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._down_until:
            raise QuotaUnavailable("it did not answer a moment ago")
        answer: asyncio.Future[Answer] = loop.create_future()
        self._put((ask, answer))
        return await answer

    def tell(self, message: Settle | Renew) -> None:
        """See `QuotaStore`."""
        self._put((message, None))

    async def aclose(self) -> None:
        """See `QuotaStore`."""
        while self._sending is not None and not self._sending.done():
            await asyncio.wait({self._sending})
        await self._aclose()

    def _put(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        if self._sending is None or self._sending.done():
            # A context of its own: Serve cancels all that was called in the context of a request when its client goes.
            self._sending = asyncio.create_task(self._send_all(), name="quotas", context=Context())

    async def _send_all(self) -> None:
        await asyncio.sleep(0)  # what other tasks say in this tick goes along
        while self._waiting:
            package = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_MESSAGES))]
            messages = [message for message, _ in package]
            try:
                answers = decode_answers(await self._carry(encode(messages), messages))
                if len(answers) != len(messages):
                    raise QuotaUnavailable(f"{len(answers)} answers to {len(messages)} messages")
            except (QuotaUnavailable, msgspec.MsgspecError) as error:
                self._failed(package, error)
                return
            for (_, future), answer in zip(package, answers, strict=True):
                if future is not None and not future.done():
                    future.set_result(answer)

    def _failed(self, package: list[_Waiting], error: Exception) -> None:
        """Tell all who wait, and keep what has ended for the next package."""
        self._down_until = asyncio.get_running_loop().time() + RETRY_S
        package += self._waiting
        for _, future in package:
            if future is not None and not future.done():
                future.set_exception(QuotaUnavailable(str(error)))
        ended = [waiting for waiting in package if isinstance(waiting[0], Settle)]
        self._waiting = deque(ended[-MAX_UNHEARD:])
