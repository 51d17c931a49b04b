"""One gRPC call of a chaos client: a new stream, or the rest of one.

The request, the metadata and the channel are those of `serve_app.client` for a URL with `grpc://`. The messages are
read here, since that client forgives what a run is to find. Each call has a channel of its own, as each HTTP request
of a run has a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import grpc
import grpc.aio

from loadtest.chaos_replies import NativeReply
from loadtest.outcome import Broken, Outcome, Refused, ended_as_if_whole
from loadtest.workload import Mode
from serve_app.client import grpc_protocol
from serve_app.proto import serve_app_pb2

_FOR_GOOD = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED})
"""Statuses that say, without an error of ours in their details, that it is no use to try again."""
_LONGEST_WAIT_S = 5.0
_LONGEST_CALL_S = 150.0


class GrpcCall:
    """A call of `Stream` at `target`. What it delivers goes to `reply`, what is out of place to `outcome`."""

    def __init__(
        self, target: str, body: Mapping[str, Any], headers: Mapping[str, str], reply: NativeReply, outcome: Outcome
    ) -> None:
        """`headers`: those that the same request has over HTTP."""
        self._target = target
        self._request = grpc_protocol.request_of(body)
        self._metadata = grpc_protocol.metadata_of(headers)
        self._resumes = outcome.visit.mode is Mode.RESUME
        self._reply = reply
        self._outcome = outcome

    async def messages(self) -> AsyncGenerator[None, None]:
        """Yields after each message with a token or with the end. Raises `Broken`, `Refused` and `ValueError`."""
        options = grpc_protocol.channel_options(self._target, resume=self._resumes)
        begun = False
        async with grpc.aio.insecure_channel(self._target, options) as channel:
            call = channel.unary_stream(grpc_protocol.STREAM)(
                self._request, metadata=self._metadata, timeout=_LONGEST_CALL_S
            )
            try:
                async for content in call:
                    begun = True
                    if self._take(serve_app_pb2.ModelOutputDocument.FromString(content)):
                        yield
            except grpc.RpcError as error:
                await self._failed(error, begun=begun)
            finally:
                call.cancel()
        if not self._reply.over:
            raise ended_as_if_whole()

    def _take(self, message: Any) -> bool:
        """Whether the message has content; one without opens a stream, or shows that the connection lives."""
        has_token, has_done = message.HasField("token_id"), message.HasField("done")
        if self._resumes:
            if not message.event_id:
                raise ValueError("asked for resume, and a message has no event_id")
            self._outcome.stream_id = message.event_id.partition(":")[0]
            self._reply.last_event_id = message.event_id
        if not has_token and not has_done:
            return False
        if self._reply.over:
            self._outcome.faults.append("a message after the last one")
        if message.event_id:
            self._reply.number(message.event_id, self._outcome)
        if has_token:
            self._reply.take_token(message.token_id, message.generated_text)
        if has_done:
            usage = message.done.usage
            self._reply.take_done(message.done.finish_reason, usage.prompt_tokens, usage.completion_tokens)
        return True

    async def _failed(self, error: grpc.RpcError, *, begun: bool) -> None:
        """Raises what the same error over HTTP raises."""
        told = f"gRPC {error.code().name}: {(error.details() or '')[:300]}"
        document = _error_of(error.details() or "")
        if document is None:
            raise ValueError(told) if error.code() in _FOR_GOOD else Broken(told)
        if begun and document["error"].get("code") != "stream_cut":
            raise ValueError(f"error in the stream: {told}")
        status, wait_s = int(document["status"]), document.get("retry_after_s")
        if not begun and status in (429, 503) and wait_s is not None:
            await asyncio.sleep(min(_LONGEST_WAIT_S, float(wait_s)))
            raise Refused
        raise ValueError(told) if status < 500 else Broken(told)


def _error_of(details: str) -> dict[str, Any] | None:
    """The API's error in the details of a status; None when they are another program's."""
    try:
        document = json.loads(details)
    except ValueError:
        return None
    return document if isinstance(document, dict) and isinstance(document.get("error"), dict) else None
