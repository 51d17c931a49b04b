"""The seam between resumable streams and whatever keeps their journals: bytes in order, one owner at a time.

A store promises that only the owner of a journal's lease writes it, and that a lease that is not renewed can be
taken. It knows no tokens and no text: a document and records are bytes. Its clock is the only one that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from serve_app.core import RequestError

_RETRY_AFTER_S = 2.0


class StoreUnavailable(RequestError):
    """The store can't be reached, or did not answer: whether the last call had an effect is not known."""

    def __init__(self, reason: str = "") -> None:
        """`reason`: for the log. The caller is told what to do."""
        message = "The store of resumable streams can't be reached; try again, or without X-Stream-Resume."
        super().__init__(message, code="journal_unavailable", retry_after_s=_RETRY_AFTER_S)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or self.message


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """How much a store keeps, and for how long."""

    max_journals: int = 1024
    max_bytes: int = 64 * 2**20
    """Of documents and records together."""
    expiry_s: float = 600.0
    """A journal that nobody owns is forgotten this long after it was last written or read."""
    lease_s: float = 1.0
    """An owner that has not written for this long may be replaced. Owners renew four times in it, so a shorter one
    would be lost to the pauses of a busy process; a longer one is a longer pause when an ingress dies."""


class LeaseStatus(StrEnum):
    """What became of an owner's lease of a journal."""

    HELD = "held"
    LOST = "lost"
    """Another owner has taken it: stop writing."""
    GONE = "gone"
    """The store no longer has it (it was restarted): create it again to go on."""
    FULL = "full"
    """The store's limits are used up by other journals that are in use; this one was dropped."""


class LeaseAction(StrEnum):
    """What becomes of a lease after an append."""

    HOLD = "hold"
    RELEASE = "release"
    """The owner stops; another may take the journal at once."""
    FINISH = "finish"
    """Nothing more will come: nobody owns it any longer."""
    DROP = "drop"
    """The stream was refused: forget it."""


@dataclass(frozen=True, slots=True)
class Append:
    """One owner's new records of one journal; without records it renews the lease."""

    stream_id: str
    owner: str
    position: int
    """Number of records before these. With it, an append that is repeated adds nothing twice."""
    records: tuple[bytes, ...] = ()
    action: LeaseAction = LeaseAction.HOLD


@dataclass(frozen=True, slots=True)
class AppendResult:
    """The answer to an append."""

    lease: LeaseStatus
    unread_s: float | None = None
    """Seconds since somebody last read the journal; None: nobody has."""
    stop: bool = False
    """Somebody asked for the end of the stream: see `JournalStore.ask_to_stop`."""


@dataclass(frozen=True, slots=True)
class JournalView:
    """What a reader sees of a journal."""

    document: bytes
    """Empty unless the reader asked for position 0, and after `JournalStore.erase`."""
    records: tuple[bytes, ...]
    """All records from the position that the reader asked for."""
    finished: bool
    leased: bool
    """Somebody owns it and renews the lease."""
    age_s: float
    """Seconds since the journal was created."""


class JournalStore(Protocol):
    """Where journals are. Every method raises `StoreUnavailable`, within a few seconds."""

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        """Begin an empty journal and hold its lease; replaces one that `owner` holds. Returns HELD, LOST or FULL.

        `tenant`: who keeps it. If there is no room, journals that nobody owns are dropped: of the tenant that holds the
        largest share of the bytes or of the number, the one that was not used for longest.
        """
        ...

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """Write to many journals in one call; one answer each, in order."""
        ...

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        """The records from `position`; None when there is no such journal.

        If there are no new records, it waits at most `wait_s` for some, for the end, or for the lease to lapse.
        """
        ...

    async def acquire(self, stream_id: str, owner: str) -> bool:
        """Take the lease if nobody holds it (compare-and-swap). False when somebody does, or nothing is there."""
        ...

    async def ask_to_stop(self, stream_id: str) -> bool:
        """Have the journal's owner end its stream: each of its appends is told so. False when nothing is there."""
        ...

    async def erase(self, stream_id: str) -> bool:
        """Delete a journal's content, also from under its owner, whose next append is LOST. False: nothing is there.

        What stays until it expires is an empty, finished journal that nobody owns. Without it the owner would find
        the journal GONE and create it again.
        """
        ...

    async def size(self) -> tuple[int, int]:
        """(journals, bytes of all together) without those that have expired."""
        ...

    async def aclose(self) -> None:
        """Let go of connections; the journals stay."""
        ...
