"""Writes the journals that this process owns, all in one call a tick, which also renews their leases.

Promises that a record is in the store a tick later, or that the owner learns why not, and that a restarted store gets
its journals back. Knows no token ids and no text.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextvars import Context

from serve_app.core import Reply, encode_replies
from serve_app.resume.journal_store import (
    Append,
    AppendResult,
    JournalStore,
    LeaseAction,
    LeaseStatus,
    StoreUnavailable,
)
from serve_app.resume.stream_id import loggable

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4


def new_owner() -> str:
    """A name that no other lease of any journal has."""
    return secrets.token_hex(16)


class OwnedJournal:
    """One journal, as long as this process owns it."""

    def __init__(
        self,
        stream_id: str,
        owner: str,
        document: bytes,
        records: Sequence[bytes],
        wake: Callable[[], None],
        tenant: str = "",
    ) -> None:
        """`records`: what the store has already; `wake`: tells the writer that there is something to write."""
        self.stream_id = stream_id
        self.owner = owner
        self.document = document
        self.tenant = tenant
        self.lease = LeaseStatus.HELD
        self.stop_asked = False
        """Somebody wants the stream to end: see `JournalStore.ask_to_stop`."""
        self.last_read: float | None = None
        """When somebody last read it, by this loop's clock; None: nobody has."""
        self.on_news: Callable[[], None] | None = None
        """Called after each renewal, also a failed one."""
        self._records = list(records)
        self._written = len(self._records)
        self._unwritten: list[tuple[int, Reply]] = []
        self.action = LeaseAction.HOLD
        """What becomes of the lease once all is written. When it is not HOLD, nothing more may be added."""
        self._renewed_at = float("-inf")
        self._wake = wake
        self.settled = asyncio.Event()
        """Set when nothing more will be written: everything has been, the lease is lost or the store is full."""

    @property
    def written_records(self) -> list[bytes]:
        """The records that the store has confirmed."""
        return self._records[: self._written]

    def write(self, choice: int, reply: Reply) -> None:
        """Add a reply of a choice, for the next tick; no effect once `settled`."""
        if not self.settled.is_set():
            self._unwritten.append((choice, reply))
            self._wake()

    def due(self, now: float, renew_s: float) -> bool:
        """Whether it has something to write, or a lease to renew."""
        return bool(self._unwritten) or self.action is not LeaseAction.HOLD or now - self._renewed_at >= renew_s

    def append(self) -> Append:
        """The next write: all records that the store has not confirmed."""
        if self._unwritten:
            self._records.append(encode_replies(self._unwritten))
            self._unwritten.clear()
        return Append(self.stream_id, self.owner, self._written, tuple(self._records[self._written :]), self.action)

    def take(self, append: Append, result: AppendResult, now: float) -> None:
        """Take in the store's answer to `append`."""
        self.lease = result.lease
        self._renewed_at = float("-inf") if result.lease is LeaseStatus.GONE else now
        self.stop_asked = self.stop_asked or result.stop
        if result.unread_s is not None:
            self.last_read = now - result.unread_s
        if result.lease is LeaseStatus.HELD:
            self._written = append.position + len(append.records)
            if append.action is not LeaseAction.HOLD:
                self.settled.set()
        elif result.lease is LeaseStatus.GONE:
            self._written = 0  # created again: all records must be written again
            self._wake()
        else:
            name = loggable(self.stream_id)
            logger.warning("the journal of stream %s can't be written any more: %s", name, result.lease)
            self.settled.set()
            if result.lease is LeaseStatus.FULL:
                self._records.clear()  # without the store's copy nobody can continue from them
                self._written = 0
        self.tell()

    def tell(self) -> None:
        """Let the owner react to the new state."""
        if self.on_news is not None:
            self.on_news()


class JournalWriter:
    """The one writer of a process, for the callers of one event loop. Its task runs while there is a journal."""

    def __init__(self, store: JournalStore, lease_s: float, tick_s: float) -> None:
        self._store = store
        self._renew_s = lease_s / RENEWALS_PER_LEASE
        self._tick_s = tick_s
        self._owned: dict[str, OwnedJournal] = {}
        """The journals to write, by owner."""
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reachable = True

    def own(
        self, stream_id: str, owner: str, document: bytes, records: Sequence[bytes] = (), tenant: str = ""
    ) -> OwnedJournal:
        """The journal that `owner` is about to create, or has just acquired with these `records`."""
        return OwnedJournal(stream_id, owner, document, records, self._due.set, tenant)

    async def create(self, journal: OwnedJournal) -> None:
        """Create a new journal in the store and keep it from now on; its `lease` says how that went.

        Raises `StoreUnavailable`.
        """
        journal.lease = await self._store.create(journal.stream_id, journal.owner, journal.document, journal.tenant)
        if journal.lease is LeaseStatus.HELD:
            self.keep(journal)

    def keep(self, journal: OwnedJournal) -> None:
        """Write and renew this journal from now on."""
        self._owned[journal.owner] = journal
        self._due.set()
        if self._task is None or self._task.done():
            # In a context of its own: the task must not end with the request that started it.
            self._task = asyncio.create_task(self._run(), name="journal writer", context=Context())

    def forget(self, journal: OwnedJournal) -> None:
        """Stop writing and renewing this journal. Records that are not written yet are lost."""
        self._owned.pop(journal.owner, None)
        self._due.set()

    async def end(self, journal: OwnedJournal, action: LeaseAction, within_s: float) -> None:
        """Write the rest with `action`, for at most `within_s`, then forget the journal."""
        journal.action = action
        self._due.set()
        try:
            async with asyncio.timeout(within_s):
                await journal.settled.wait()
        except TimeoutError:
            logger.warning("the end of stream %s could not be written to its journal", loggable(journal.stream_id))
        finally:
            self.forget(journal)

    async def _run(self) -> None:
        while self._owned:
            try:
                async with asyncio.timeout(self._renew_s):
                    await self._due.wait()
            except TimeoutError:
                pass  # nothing to write: leases are to be renewed
            self._due.clear()
            await self._write()
            await asyncio.sleep(self._tick_s)

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        due = [journal for journal in self._owned.values() if journal.due(loop.time(), self._renew_s)]
        if not due:
            return
        appends = [journal.append() for journal in due]
        try:
            answers = await self._store.append(appends)
            for journal, append, result in zip(due, appends, answers, strict=True):
                if result.lease is LeaseStatus.GONE:
                    result = await self._create_again(journal)
                journal.take(append, result, loop.time())
                if journal.settled.is_set():
                    self.forget(journal)
            self._reachable = True
        except StoreUnavailable as error:
            if self._reachable:
                logger.warning(
                    "the store of journals can't be reached, so streams can't be resumed at another ingress: %s", error
                )
            self._reachable = False
            for journal in due:
                journal.tell()

    async def _create_again(self, journal: OwnedJournal) -> AppendResult:
        """Create a journal again that the store has lost. Raises `StoreUnavailable`."""
        lease = await self._store.create(journal.stream_id, journal.owner, journal.document, journal.tenant)
        name = loggable(journal.stream_id)
        logger.warning("the store has lost the journal of stream %s; created again: %s", name, lease)
        return AppendResult(LeaseStatus.GONE if lease is LeaseStatus.HELD else lease)
