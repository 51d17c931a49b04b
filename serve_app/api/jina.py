"""GET /stream with a JSON body: what Jina's client sends and reads with `Client(protocol="http").stream_doc(...)`.

The client splits what it receives at `event: `, expects CRLF, and reads the rest of an `update` as JSON. Promises
events that it can read. Source: HTTPClientlet.send_streaming_message of Jina 3.34.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.api.errors import api_error, bad_request
from serve_app.api.headers import RESUME_QUERY
from serve_app.api.http.endpoint import Call
from serve_app.api.http.sse import json_text
from serve_app.api.native import NativeFormat, NativeWriter, PromptDocument, read_document
from serve_app.core import RequestError
from serve_app.generation.completion import Usage
from serve_app.generation.events import EventWriter
from serve_app.generation.request import ResolvedRequest


class JinaFormat(NativeFormat):
    """The wire format of GET /stream with a body. The body is a `PromptDocument` that may have an `id`."""

    name = "jina"

    def document(self, call: Call) -> PromptDocument:
        """See `NativeFormat`. The document's own id is not used: each token's document has an id of its own."""
        if other := next((name for name in call.query if name != RESUME_QUERY), None):
            message = "Give the document in the query or in the body, not in both."
            raise bad_request(message, param=other[:100], code="invalid_value")
        return read_document({name: value for name, value in (call.body or {}).items() if name != "id"})

    def writer(self, request: ResolvedRequest, settings: Mapping[str, Any]) -> EventWriter:
        """See `WireFormat`."""
        return JinaWriter(request.seed, request.requests[0].request_id)


class JinaWriter(NativeWriter):
    """One `update` a token, then `end`."""

    def __init__(self, seed: int, request_id: str) -> None:
        super().__init__(seed)
        self._request_id = request_id
        self._documents = 0

    def ended(self, usage: Usage) -> list[bytes]:
        """The `end` event. Jina's client ignores its data, which is that of `done`."""
        return [f"event: end\r\ndata: {self._summary(usage)}\r\n\r\n".encode()]

    def failed(self, error: RequestError) -> bytes:
        """The `error` event, which ends the stream. Jina's client ignores it."""
        return b"event: error\r\ndata: " + api_error(error).body() + b"\r\n\r\n"

    def _event(self, token_id: int, text: str) -> bytes:
        text_json = json_text(text).replace("event: ", "event\\u003a ")
        document_id = f"{self._request_id}-{self._documents}"
        self._documents += 1
        data = f'{{"id":"{document_id}","token_id":{token_id},"generated_text":{text_json}}}'
        return f"event: update\r\ndata: {data}\r\n\r\n".encode()
