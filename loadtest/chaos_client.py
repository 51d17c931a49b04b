"""One client of a chaos run: asks, reads, is cut off, resumes or repeats, and notes everything that it saw.

Written against the wire and not with `serve_app.client`, whose leniency would hide what the run is to find: event ids
must go up by one, a stream must end with its last event, and an error must look like one.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing

import httpx
from httpx_sse import EventSource

from loadtest.chaos_grpc import GrpcCall
from loadtest.chaos_replies import NativeReply, new_reply
from loadtest.outcome import Broken, Cut, Outcome, Refused, ended_as_if_whole
from loadtest.workload import Mode, Question, Visit, Wire

DEADLINE_S = 150.0
"""Of one request, with all its resumes, after its last event: an answer is late, and not lost, while it comes."""
LAST_DEADLINE_S = 400.0
"""Of one client with all its repetitions."""
TIMEOUT = httpx.Timeout(60, connect=30)
"""A stream that sends nothing for so long, not even a heartbeat, counts as cut. A connection is accepted at once, or
refused: only a stall of this very program would take long."""
_WHOLE_TIMEOUT = httpx.Timeout(DEADLINE_S, connect=30)
"""Of an answer that is no stream: nothing of it comes before all of it."""
_BACKOFF_S = 0.25


class ChaosClient:
    """One visit, played against the service at `url`, or for gRPC at `grpc_target` (`host:port`)."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, question: Question, visit: Visit, grpc_target: str = ""
    ) -> None:
        self._http = http
        self._url = url
        self._grpc_target = grpc_target
        self._question = question
        self._mode = visit.mode
        self._drops = list(visit.drops)
        self._reply = new_reply(question)
        self._connection: asyncio.Task[None] | None = None
        self.outcome = Outcome(visit, time.monotonic())

    def cut(self) -> bool:
        """Drop the connection now, if this client would resume and has one that delivers."""
        if self._mode is not Mode.RESUME or self._connection is None or self._connection.done() or self._reply.over:
            return False
        return self._connection.cancel()

    async def play(self) -> Outcome:
        """Until the answer is there or there will be none."""
        self._last_s = asyncio.get_running_loop().time() + LAST_DEADLINE_S
        try:
            async with asyncio.timeout(DEADLINE_S) as self._deadline:
                await self._until_answered()
        except TimeoutError:
            self.outcome.failure = f"no answer in time; {self._so_far()}"
        except (ValueError, KeyError, LookupError) as error:
            self.outcome.failure = f"{error}; {self._so_far()}"
        self.outcome.ended_s = time.monotonic()
        return self.outcome

    def _so_far(self) -> str:
        return f"{len(self.outcome.arrivals_s)} events, connections broken: {[what for _, what in self.outcome.broken]}"

    async def _until_answered(self) -> None:
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
                    self._reply, self.outcome.arrivals_s = new_reply(self._question), []
                    self._goes_on()
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
        request_id = f"chaos-{self.outcome.visit.number}-{len(self.outcome.request_ids)}"
        self.outcome.request_ids.append(request_id)
        headers = {"X-Request-Id": request_id}
        if self._mode is Mode.RESUME and self._question.wire is not Wire.RESPONSES:
            headers["X-Stream-Resume"] = "1"
        if self._question.wire is Wire.GRPC:
            await self._call(headers)
            return
        body = self._question.asked(self._mode)
        timeout = _WHOLE_TIMEOUT if self._mode is Mode.WHOLE else TIMEOUT
        url = f"{self._url}{self._question.wire}"
        await self._read(self._http.build_request("POST", url, json=body, headers=headers, timeout=timeout))

    async def _resume(self) -> None:
        headers = {"X-Stream-Resume": "1"}
        if self._reply.last_event_id:
            headers["Last-Event-ID"] = self._reply.last_event_id
        stream_id = self.outcome.stream_id
        if self._question.wire is Wire.GRPC:
            await self._call(headers)
        elif self._question.wire is Wire.RESPONSES:
            query = {"stream": "true", "starting_after": self._reply.last_event_id}
            url = f"{self._url}/v1/responses/resp_{stream_id}"
            await self._read(self._http.build_request("GET", url, params=query))
        else:
            await self._read(self._http.build_request("GET", f"{self._url}/v1/streams/{stream_id}", headers=headers))

    async def _call(self, headers: dict[str, str]) -> None:
        """One gRPC call to its end. Raises as `_read` does."""
        assert isinstance(self._reply, NativeReply)
        if key := self._http.headers.get("authorization"):
            headers = headers | {"authorization": key}
        call = GrpcCall(self._grpc_target, self._question.body, headers, self._reply, self.outcome)
        async with aclosing(call.messages()) as messages:
            async for _ in messages:
                self._arrived()

    async def _read(self, request: httpx.Request) -> None:
        """One connection to its end. Raises `Broken`, `httpx.TransportError` and `ValueError` (an answer: no)."""
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code != 200:
                await self._refusal(response)
            self.outcome.stream_id = response.headers.get("x-stream-id", self.outcome.stream_id)
            if self._mode is Mode.WHOLE:
                self._reply.take_whole(json.loads(await response.aread()))
                return
            by_header = self._mode is Mode.RESUME and self._question.wire is not Wire.RESPONSES
            if by_header and "x-stream-id" not in response.headers:
                raise ValueError("asked for resume, and the response has no x-stream-id")
            await self._read_events(response)
        finally:
            await response.aclose()

    async def _read_events(self, response: httpx.Response) -> None:
        async with aclosing(EventSource(response).aiter_sse()) as events:
            async for event in events:
                if event.data:  # else a heartbeat
                    self._reply.take(event, self.outcome)
                    self._arrived()
        if not self._reply.over:
            raise ended_as_if_whole()

    def _arrived(self) -> None:
        """An event came. Raises `Cut` where this client is to drop its connection."""
        self.outcome.arrivals_s.append(time.monotonic())
        self._goes_on()
        if self._drops and self._reply.next_index > self._drops[0] and not self._reply.over:
            self._drops.pop(0)
            raise Cut

    def _goes_on(self) -> None:
        """The client waits for another `DEADLINE_S`, within its last deadline."""
        self._deadline.reschedule(min(self._last_s, asyncio.get_running_loop().time() + DEADLINE_S))

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
