# Made from asynchronous_grpc.py by scripts/unasync.py: change that file, then run `make client`.
"""The blocking client's channels over gRPC: calls, retries, and streams that survive a lost connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

import grpc

from serve_app.client import grpc_protocol, protocol
from serve_app.client.documents import Done, Model, ModelOutputDocument, Readiness
from serve_app.client.errors import NotReady, ServeAppError
from serve_app.client.resume import Position


class Grpc:
    """Channels to one server."""

    def __init__(self, base_url: str, headers: Mapping[str, str] | None, retries: int, timeout_s: float) -> None:
        """See `Client`."""
        self._url = base_url
        self._target, self._secure = grpc_protocol.target_of(base_url)
        self._headers = dict(headers or {})
        self._retries = retries
        self._timeout_s = timeout_s
        self._channels: dict[bool, Any] = {}
        """By whether they are for streams that can be resumed."""
        self._making = threading.Lock()
        """Held while a channel is made: threads that share a client make one together."""

    def items(
        self, body: dict[str, Any], headers: dict[str, str], *, resume: bool
    ) -> Generator[ModelOutputDocument | Done, None]:
        """The documents of one stream; with `resume`, over as many calls as it takes."""
        position = Position()
        request, failures = grpc_protocol.request_of(body), 0
        while True:
            try:
                with closing(self._documents(request, headers | position.headers, position, resume)) as documents:
                    yield from documents
                return
            except ServeAppError as error:
                pause_s = position.pause_s(error)
                if pause_s is None and position.is_fresh and grpc_protocol.may_be_repeated(error):
                    pause_s = protocol.retry_delay_s(error, failures, self._retries)
                if pause_s is None:
                    raise
            failures += 1
            time.sleep(pause_s)

    def models(self) -> tuple[Model, ...]:
        """See `Client`."""
        raise ServeAppError("the models can't be listed over gRPC; ask the server's HTTP address")

    def ready(self) -> Readiness:
        """See `Client`."""
        check = self._channel(False).unary_unary(grpc_protocol.CHECK)
        try:
            answer = check(
                b"", metadata=grpc_protocol.metadata_of(self._headers), timeout=grpc_protocol.CHECK_TIMEOUT_S
            )
        except grpc.RpcError as reason:
            error = grpc_protocol.error_of(reason, self._url, begun=False)
            if isinstance(error, NotReady) or reason.code() == grpc.StatusCode.NOT_FOUND:  # Serve has no route yet
                return Readiness(ready=False)
            raise error from reason
        return Readiness(ready=answer == grpc_protocol.SERVING)

    def close(self) -> None:
        """Close the channels, and with them every stream."""
        for channel in self._channels.values():
            channel.close()

    def _documents(
        self, request: bytes, headers: dict[str, str], position: Position, resume: bool
    ) -> Generator[ModelOutputDocument | Done, None]:
        """The documents of one call. Raises ConnectionLost when it ends before the stream does."""
        metadata = grpc_protocol.metadata_of(self._headers | headers)
        call = self._channel(resume).unary_stream(grpc_protocol.STREAM)(
            request, metadata=metadata, timeout=self._timeout_s
        )
        begun = done = False
        try:
            for content in call:
                begun = True
                item = grpc_protocol.read_message(content, position)
                if item is not None:
                    done = isinstance(item, Done)
                    yield item
        except grpc.RpcError as reason:
            if not done:
                raise grpc_protocol.error_of(reason, self._url, begun=begun) from reason
        finally:
            call.cancel()
        if not done:
            raise protocol.ended_early()

    def _channel(self, resume: bool) -> Any:
        with self._making:
            if resume not in self._channels:
                options = grpc_protocol.channel_options(self._target, resume=resume)
                if self._secure:
                    credentials = grpc.ssl_channel_credentials()
                    self._channels[resume] = grpc.secure_channel(self._target, credentials, options)
                else:
                    self._channels[resume] = grpc.insecure_channel(self._target, options)
            return self._channels[resume]
