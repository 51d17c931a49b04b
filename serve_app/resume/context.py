"""What all resumable streams of one process share: the replicas, the store, the limits. Knows no stream's state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from serve_app.backoff import backoff_s
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.replica import ReplicaClient
from serve_app.resume.event_log import EventMemory
from serve_app.resume.journal_store import JournalStore, JournalView, StoreUnavailable
from serve_app.resume.refusals import StreamGone
from serve_app.resume.writer import JournalWriter

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""The pauses between calls to a store that can't be reached grow from `_FIRST_PAUSE_S` to this."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class ResumeSettings:
    """How long streams live without a reader, and how many."""

    grace_s: float = 30.0
    """A stream goes on this long after its last reader went."""
    max_unattended: int = 64
    """How many streams without a reader one process goes on with. Of more, those longest without a reader stop."""
    max_background: int = 64
    """How many streams that go on without a reader one process begins. One more is refused."""
    refusal_s: float = 0.5
    """How long the beginning of such a stream waits for a replica to refuse it. A refusal that comes later is how the
    stream ends. Replicas that are full refuse within milliseconds."""
    settle_s: float = 5.0
    """How long to wait for a store that can't be reached, when a stream ends and when one is followed."""
    gone_s: float = 4.0
    """How long a journal must be missing before its stream counts as gone. A restarted store lacks the journals of
    running streams until their owners write them again: within a lease, or once the journal actor has started (1 to 3 s
    on the 2-core machine)."""
    lease_s: float = 1.0
    """The store's `JournalLimits.lease_s`."""
    tick_s: float = 0.1
    """Seconds between two calls to the store. If an owner dies, what it has not written yet is generated again. Readers
    at another ingress are this far behind. A call to the journal actor, for 10 journals, costs about 1 ms of CPU over
    all processes."""
    max_event_bytes: int = 64 * 2**20
    """Limit for the events of all streams of one process. Older events that a reader needs are made again."""
    max_stream_event_bytes: int = 4 * 2**20
    """Limit for the events of one stream."""


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What all streams of a process share."""

    client: ReplicaClient
    failover: FailoverSettings
    store: JournalStore
    writer: JournalWriter
    settings: ResumeSettings
    memory: EventMemory

    async def look(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView:
        """See `JournalStore.read`. Raises `StreamGone` if there is no journal for `gone_s`, and `StoreUnavailable`."""
        loop, deadline = asyncio.get_running_loop(), None
        while (view := await self.reach(partial(self.store.read, stream_id, position, wait_s))) is None:
            deadline = deadline or loop.time() + self.settings.gone_s
            left_s = deadline - loop.time()
            if left_s <= 0:
                raise StreamGone
            await asyncio.sleep(min(left_s, self.settings.lease_s / 4))
        return view

    async def reach(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """The store's answer to `call`, which may be repeated. Raises `StoreUnavailable` after `settle_s` without one.

        A store that fails over, or an actor that starts again, is there a moment later: no stream should end for that.
        """
        loop = asyncio.get_running_loop()
        deadline, failures = loop.time() + self.settings.settle_s, 0
        while True:
            try:
                return await call()
            except StoreUnavailable:
                left_s = deadline - loop.time()
                if left_s <= 0:
                    raise
            failures += 1
            await asyncio.sleep(min(left_s, backoff_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)))
