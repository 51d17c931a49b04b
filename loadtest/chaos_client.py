"""One client of a chaos run: asks, reads, is cut off, resumes or repeats, and notes everything that it saw.

Written against the wire and not with `serve_app.client`, whose leniency would hide what the run is to find: event ids
must go up by one, a stream must end with its last event, and an error must look like one.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent

from loadtest.verdicts import Answer
from loadtest.workload import Mode, Question, Visit, Wire

DEADLINE_S = 150.0
"""Of one request, with all its resumes: the service's own deadline is longer, and a run must end."""
LAST_DEADLINE_S = 400.0
"""Of one client with all its repetitions."""
SILENCE_S = 60.0
_BACKOFF_S = 0.25


@dataclass(slots=True)
class Outcome:
    """What one client saw. Times are of `time.monotonic`."""

    visit: Visit
    began_s: float
    ended_s: float = 0.0
    answer: Answer | None = None
    failure: str | None = None
    """Why there is no answer."""
    broken: list[tuple[float, str]] = field(default_factory=list)
    """Connections that ended without the client's doing, as it was told."""
    refused: int = 0
    """429 and 503 with Retry-After."""
    cut_s: list[float] = field(default_factory=list)
    """When the client dropped its own connection."""
    resumed: int = 0
    faults: list[str] = field(default_factory=list)
    """Of the wire: events that were repeated, left out or out of place."""
    repeated_events: bool = False
    arrivals_s: list[float] = field(default_factory=list)
    """Of events of the answer that it ended with."""
    request_ids: list[str] = field(default_factory=list)
    """Its own, one for each time it asked."""
    stream_id: str = ""
    """The service's, of a stream that can be resumed."""


class Broken(Exception):
    """The connection ended before the answer did: a transport error, or an answer of 5xx."""


class Refused(Exception):
    """The server said when to try again, before it had accepted anything."""


class Cut(Exception):
    """The client has dropped its own connection."""


class Reply:
    """Collects one answer from the events of either wire."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._texts = [""] * question.choices
        self._reasons: list[str | None] = [None] * question.choices
        self._token_ids: list[int] = []
        self._logprobs: list[list[Any]] = [[] for _ in range(question.choices)]
        self._usage: dict[str, int] | None = None
        self._stream_id = ""
        self.next_index = 0
        """Of events with ids."""
        self.last_event_id = ""
        self.over = False

    def take(self, event: ServerSentEvent, outcome: Outcome) -> None:
        """One event. Raises `ValueError` when it is an error, or none that this wire has."""
        document = None if event.data == "[DONE]" else json.loads(event.data)
        if document is not None and "error" in document:
            raise ValueError(f"error event: {document['error']['code']}: {document['error']['message']}")
        if self.over:
            outcome.faults.append("an event after the last one")
        if event.id:
            self._number(event.id, outcome)
        if document is None:
            self.over = True
        elif self._question.wire is Wire.CHAT:
            self._take_chunk(document)
        elif event.event == "done":
            self._reasons[0], self._usage, self.over = document["finish_reason"], document["usage"], True
        else:
            self._token_ids.append(document["token_id"])
            self._texts[0] += document["generated_text"]

    def _number(self, event_id: str, outcome: Outcome) -> None:
        stream_id, index, _ = event_id.split(":")  # the last is a digest of the text so far, for the server to read
        if self._stream_id not in ("", stream_id):
            outcome.faults.append(f"an event of stream {stream_id} in stream {self._stream_id}")
        if not self._stream_id:
            self._stream_id, self.next_index = stream_id, int(index)
            if int(index) > 1:
                outcome.faults.append(f"the first event has index {index}")
        if int(index) != self.next_index:
            outcome.faults.append(f"event {index} where {self.next_index} was due")
            outcome.repeated_events |= int(index) < self.next_index
        self.next_index = int(index) + 1
        self.last_event_id = event_id

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        for choice in chunk["choices"]:
            index = choice["index"]
            self._texts[index] += choice["delta"].get("content") or ""
            self._take_end(index, choice)

    def _take_end(self, index: int, choice: dict[str, Any]) -> None:
        self._reasons[index] = choice["finish_reason"] or self._reasons[index]
        if choice["logprobs"]:
            self._logprobs[index] += [_entry(token) for token in choice["logprobs"]["content"]]

    def take_whole(self, document: dict[str, Any]) -> None:
        """A chat completion that was not streamed."""
        for choice in document["choices"]:
            self._texts[choice["index"]] = choice["message"]["content"]
            self._take_end(choice["index"], choice)
        self._usage, self.over = document["usage"], True

    def answer(self) -> Answer:
        """The finished answer. Raises `ValueError` when it lacks its usage."""
        if self._usage is None:
            raise ValueError("the answer ended without its usage")
        return Answer(
            tuple(self._texts),
            tuple(self._reasons),
            self._usage["prompt_tokens"],
            self._usage["completion_tokens"],
            self._native_ids(self._usage["completion_tokens"]) if self._question.wire is Wire.NATIVE else None,
            tuple(tuple(entries) for entries in self._logprobs) if self._question.body.get("logprobs") else None,
        )

    def _native_ids(self, completion_tokens: int) -> tuple[int, ...]:
        """Text that became certain only as the answer ended comes in one more document, which repeats the last id."""
        ids = self._token_ids
        extra = len(ids) == completion_tokens + 1 and ids[-1:] == ids[-2:-1]
        return tuple(ids[:completion_tokens] if extra else ids)


def _entry(token: dict[str, Any]) -> Any:
    return token["token"], token["logprob"], tuple((top["token"], top["logprob"]) for top in token["top_logprobs"])


class ChaosClient:
    """One visit, played against the service at `url`."""

    def __init__(self, http: httpx.AsyncClient, url: str, question: Question, visit: Visit) -> None:
        self._http = http
        self._url = url
        self._question = question
        self._mode = visit.mode
        self._drops = list(visit.drops)
        self._reply = Reply(question)
        self._connection: asyncio.Task[None] | None = None
        self.outcome = Outcome(visit, time.monotonic())

    def cut(self) -> bool:
        """Drop the connection now, if this client would resume and has one that delivers."""
        if self._mode is not Mode.RESUME or self._connection is None or self._connection.done() or self._reply.over:
            return False
        return self._connection.cancel()

    async def play(self) -> Outcome:
        """Until the answer is there or there will be none."""
        try:
            async with asyncio.timeout(DEADLINE_S) as deadline:
                await self._until_answered(deadline)
        except TimeoutError:
            self.outcome.failure = f"no answer in time; {self._so_far()}"
        except (ValueError, KeyError, LookupError) as error:
            self.outcome.failure = f"{error}; {self._so_far()}"
        self.outcome.ended_s = time.monotonic()
        return self.outcome

    def _so_far(self) -> str:
        return f"{len(self.outcome.arrivals_s)} events, connections broken: {[what for _, what in self.outcome.broken]}"

    async def _until_answered(self, deadline: asyncio.Timeout) -> None:
        now = asyncio.get_running_loop().time
        last_s = now() + LAST_DEADLINE_S
        failures = 0
        while not self._reply.over:
            resuming = bool(self.outcome.stream_id)
            self.outcome.resumed += resuming
            self._connection = asyncio.create_task(self._resume() if resuming else self._ask())
            try:
                await self._finished(self._connection)
                break
            except Cut:
                self.outcome.cut_s.append(time.monotonic())
                failures = 0
            except Refused:
                self.outcome.refused += 1
            except (Broken, httpx.TransportError) as error:
                self.outcome.broken.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                failures += 1
                if not self.outcome.stream_id:
                    self._reply, self.outcome.arrivals_s = Reply(self._question), []
                    deadline.reschedule(min(last_s, now() + DEADLINE_S))
                await asyncio.sleep(min(2.0, _BACKOFF_S * 2**failures))
        self.outcome.answer = self._reply.answer()

    async def _finished(self, connection: asyncio.Task[None]) -> None:
        """Wait for one connection. Raises `Cut` when it was this client that ended it."""
        try:
            await connection
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                connection.cancel()
                await asyncio.wait({connection})
                raise
            raise Cut from None

    async def _ask(self) -> None:
        body = dict(self._question.body)
        request_id = f"chaos-{self.outcome.visit.number}-{len(self.outcome.request_ids)}"
        self.outcome.request_ids.append(request_id)
        headers = {"X-Request-Id": request_id}
        if self._question.wire is Wire.CHAT and self._mode is not Mode.WHOLE:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._mode is Mode.RESUME:
            headers["X-Stream-Resume"] = "1"
        request = self._http.build_request("POST", f"{self._url}{self._question.wire}", json=body, headers=headers)
        await self._read(request)

    async def _resume(self) -> None:
        headers = {"X-Stream-Resume": "1"}
        if self._reply.last_event_id:
            headers["Last-Event-ID"] = self._reply.last_event_id
        await self._read(
            self._http.build_request("GET", f"{self._url}/v1/streams/{self.outcome.stream_id}", headers=headers)
        )

    async def _read(self, request: httpx.Request) -> None:
        """One connection to its end. Raises `Broken`, `httpx.TransportError` and `ValueError` (an answer: no)."""
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code != 200:
                await self._refusal(response)
            self.outcome.stream_id = response.headers.get("x-stream-id", "")
            if self._mode is Mode.WHOLE:
                self._reply.take_whole(json.loads(await response.aread()))
                return
            if self._mode is Mode.RESUME and not self.outcome.stream_id:
                raise ValueError("asked for resume, and the response has no x-stream-id")
            await self._read_events(response)
        finally:
            await response.aclose()

    async def _read_events(self, response: httpx.Response) -> None:
        async with aclosing(EventSource(response).aiter_sse()) as events:
            async for event in events:
                if event.data:  # else a heartbeat
                    self._reply.take(event, self.outcome)
                    self.outcome.arrivals_s.append(time.monotonic())
                if self._drops and self._reply.next_index > self._drops[0] and not self._reply.over:
                    self._drops.pop(0)
                    raise Cut
        if not self._reply.over:
            raise Broken("the body ended, as if it were whole, before the last event")

    async def _refusal(self, response: httpx.Response) -> None:
        """Raises `Refused` after the time it names, `Broken` where trying again may help, else `ValueError`."""
        text = (await response.aread()).decode(errors="replace")[:300]
        told = f"HTTP {response.status_code}: {text}"
        wait = response.headers.get("retry-after")
        if response.status_code in (429, 503) and wait is not None:
            await asyncio.sleep(min(5.0, float(wait)))
            raise Refused
        if response.status_code < 500:
            raise ValueError(told)
        raise Broken(told)
