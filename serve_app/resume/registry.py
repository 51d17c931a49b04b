"""All resumable streams of one ingress: begins new ones, finds those that began here or elsewhere.

Promises one object for each stream, however many readers it has. Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

from serve_app.core import MessageError
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.replica import ReplicaClient
from serve_app.resume.context import ResumeSettings, StreamContext
from serve_app.resume.event_log import EventMemory
from serve_app.resume.journal_store import JournalStore, JournalView
from serve_app.resume.records import StreamDocument, read_document
from serve_app.resume.refusals import StreamGone
from serve_app.resume.stored import StoredStream, end_stored, read_stored
from serve_app.resume.stream import ResumableStream
from serve_app.resume.stream_id import loggable, new_stream_id
from serve_app.resume.transcript import Transcript
from serve_app.resume.writer import JournalWriter

logger = logging.getLogger(__name__)


class ResumableStreams:
    """All resumable streams of one process, used from its event loop."""

    def __init__(
        self,
        client: ReplicaClient,
        store: JournalStore,
        settings: ResumeSettings | None = None,
        failover: FailoverSettings | None = None,
    ) -> None:
        settings = settings or ResumeSettings()
        writer = JournalWriter(store, settings.lease_s, settings.tick_s)
        memory = EventMemory(settings.max_event_bytes, settings.max_stream_event_bytes)
        self._context = StreamContext(client, failover or FailoverSettings(), store, writer, settings, memory)
        self._streams: dict[str, ResumableStream] = {}
        """The streams that this process generates or follows. Each adds and removes itself."""
        self._finished: WeakValueDictionary[str, ResumableStream] = WeakValueDictionary()
        """Streams that were found in the store with all their events, as long as somebody reads them."""

    @staticmethod
    def new_id() -> str:
        """See `stream_id`."""
        return new_stream_id()

    def __len__(self) -> int:
        """Streams that are generated or followed here."""
        return len(self._streams)

    async def journals(self) -> tuple[int, int]:
        """(journals, their bytes) of all processes that share the store. Raises `StoreUnavailable`."""
        return await self._context.store.size()

    def new(self, stream_id: str, document: StreamDocument, transcript: Transcript) -> ResumableStream:
        """A stream that does nothing yet; the `begin` of a new one starts it."""
        return ResumableStream(stream_id, document, transcript, self._context, self._streams)

    async def find(self, stream_id: str, make: Callable[[StreamDocument], Transcript]) -> ResumableStream:
        """The stream, whoever owns it. `make` gives an empty transcript for a document, or raises.

        The caller must enter the stream's `attended` before it awaits anything: a follower without a reader ends.
        Raises `StreamGone` for a journal that is missing for `gone_s` or can't be read, and `StoreUnavailable` if the
        store can't be reached for `settle_s`.
        """
        while (there := self._here(stream_id)) is None and (ending := self._streams.get(stream_id)) is not None:
            await ending.closed()
        if there is not None:
            return there
        view = await self._context.look(stream_id, 0)
        if (there := self._here(stream_id)) is not None:  # another request for it came first
            return there
        stream = self._from_journal(stream_id, view, make)
        await stream.catch_up(view)
        if (there := self._here(stream_id)) is not None:
            return there
        stream.follow()
        if stream.finished:
            self._finished[stream_id] = stream
        return stream

    def _from_journal(
        self, stream_id: str, view: JournalView, make: Callable[[StreamDocument], Transcript]
    ) -> ResumableStream:
        """An object for a stream that was found in the store, without its records. Raises `StreamGone`."""
        if not view.document:  # it was erased
            raise StreamGone
        try:
            document = read_document(view.document)
        except MessageError as error:
            logger.error("the journal of stream %s can't be read", loggable(stream_id), exc_info=error)
            raise StreamGone from error
        return self.new(stream_id, document, make(document))

    async def stored(self, stream_id: str, patience_s: float = 0.0) -> StoredStream:
        """What the stream's journal holds; see `read_stored`. Raises `StreamGone` and `StoreUnavailable`."""
        return await read_stored(self._context, stream_id, patience_s)

    async def cancel(self, stream_id: str, make: Callable[[StreamDocument], Transcript]) -> None:
        """End the stream, whoever generates it; see `end_stored`. `make`: as for `find`.

        Raises `StreamGone`, `StoreUnavailable` and `OwnerSilent`.
        """

        async def has_ended(view: JournalView) -> bool:
            stream = self._from_journal(stream_id, view, make)
            await stream.catch_up(view)
            return stream.finished

        if (there := self._streams.get(stream_id)) is not None:
            there.ask_to_stop()
        await end_stored(self._context, stream_id, has_ended)

    async def erase(self, stream_id: str) -> None:
        """Delete the stream, also while it is generated. Raises `StreamGone` and `StoreUnavailable`."""
        if not await self._context.reach(partial(self._context.store.erase, stream_id)):
            raise StreamGone
        self._finished.pop(stream_id, None)
        if (there := self._streams.get(stream_id)) is not None:
            there.lose()
            if there.finished:  # it is found here until its end is written
                await there.closed()

    def _here(self, stream_id: str) -> ResumableStream | None:
        """The object that this process has for the stream, if it has all events or still gets them."""
        stream = self._streams.get(stream_id) or self._finished.get(stream_id)
        return stream if stream is not None and (stream.finished or not stream.feed.closed) else None

    async def aclose(self) -> None:
        """Stop all, so that other ingresses take them over at once."""
        await asyncio.gather(*(stream.aclose() for stream in list(self._streams.values())))
        await self._context.store.aclose()
