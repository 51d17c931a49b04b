"""Reads a request's JSON: bounded in bytes, depth and time, whatever a client sends.

Promises a decoded JSON object or an `ApiError` that says what is wrong with the bytes. Knows no field.
"""

from __future__ import annotations

import asyncio
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from typing import Any

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from serve_app.api.errors import ApiError, bad_request, body_too_large
from serve_app.api.http.slow_bodies import PROMPTLY_S, SlowBodies, TooManySlowBodies

BODY_TIMEOUT_S = 30.0
"""A client that takes longer to send its request is refused."""
MAX_JSON_PARTS = 100_000
"""Objects, lists and strings, keys included, in one body. The event loop stands still while they are made: 1.4 million
empty lists, 4 MiB, took 0.9 s with Python's garbage collection. So many messages of a chat are 20,000."""

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class ClientGone(Exception):
    """The client has closed its connection, or reads no more: nobody waits for an answer."""

    def __init__(self, outcome: str = "disconnected") -> None:
        super().__init__(outcome)
        self.outcome = outcome
        """For the log."""


async def read_json_object(
    scope: Scope, receive: Receive, max_bytes: int, slow_bodies: SlowBodies
) -> tuple[dict[str, Any], int]:
    """The body as a JSON object, and its size in bytes. Raises `ApiError` (400, 408, 413, 415) and `ClientGone`.

    A body that takes longer than `PROMPTLY_S` to arrive needs a place in `slow_bodies`. Any content type is accepted if
    the bytes are JSON: curl's default is the content type of a form.
    """
    headers = Headers(scope=scope)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, "Compressed request bodies are not accepted; send plain JSON.", code="unsupported_encoding")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise body_too_large(max_bytes)
    incoming = _Incoming(receive, max_bytes)
    promptly_s = min(PROMPTLY_S, BODY_TIMEOUT_S)
    if not await incoming.read(promptly_s):
        client = scope.get("client")
        try:
            with slow_bodies.place(client[0] if client else None):
                if not await incoming.read(BODY_TIMEOUT_S - promptly_s):
                    raise _too_slow(f"The request body did not arrive within {BODY_TIMEOUT_S:g} s.")
        except TooManySlowBodies:
            message = f"The request body did not arrive within {promptly_s:g} s, and too many others are slow too."
            raise _too_slow(message) from None
    body = b"".join(incoming.chunks)
    return _decode(body, headers.get("content-type", "")), len(body)


class _Incoming:
    """A body that is being received. After a timeout, `read` can be called again for the rest."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._left = max_bytes
        self._max_bytes = max_bytes
        self.chunks: list[bytes] = []

    async def read(self, within_s: float) -> bool:
        """Whether the whole body arrived within `within_s`. Raises `ApiError` and `ClientGone`."""
        more = True
        try:
            async with asyncio.timeout(within_s) as deadline:
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk: bytes = message.get("body", b"")
                    self._left -= len(chunk)
                    if self._left < 0:
                        raise body_too_large(self._max_bytes)
                    self.chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            if not deadline.expired():
                raise
            return False
        return True


def _decode(body: bytes, content_type: str) -> dict[str, Any]:
    if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in body[:2]:  # JSON in UTF-8 has no NUL
        raise bad_request("The request body is UTF-16 or UTF-32; send JSON as UTF-8.", code="invalid_json")
    body = body.removeprefix(BOM_UTF8)  # Windows' editors and PowerShell write one
    if not body.strip():
        raise bad_request("The request body is empty; send a JSON object.", code="invalid_json")
    if _has_too_many_parts(body):
        message = (
            f"The request body has more than {MAX_JSON_PARTS} objects, lists and strings; send less at once. "
            "Logprobs of earlier answers can be left out."
        )
        raise bad_request(message, code="invalid_value")
    try:
        # pydantic's parser: bounded in depth, and strict about UTF-8, lone surrogates, NaN and Infinity.
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if content_type.split(";")[0].strip().lower() in _FORMS:
            message = "The request body is a form; send a JSON object with the header 'content-type: application/json'."
            raise ApiError(415, message, code="unsupported_media_type") from None
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as reason:
            message = f"The request body is not valid UTF-8 (byte {reason.start})."
            raise bad_request(message, code="invalid_json") from None
        raise bad_request(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The request body must be a JSON object.", code="invalid_json")
    return value


def _has_too_many_parts(body: bytes) -> bool:
    """Whether this JSON has more than `MAX_JSON_PARTS`. Takes at most 0.1 s for 4 MiB, and mostly 5 ms."""
    if _parts(body) <= MAX_JSON_PARTS:
        return False
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
    if plain.count(b'"') > 2 * MAX_JSON_PARTS:
        return True
    outside = b"".join(plain.split(b'"')[::2])
    return _parts(outside) + plain.count(b'"') // 2 > MAX_JSON_PARTS


def _parts(text: bytes) -> int:
    """Objects, lists and strings of JSON, if no string has brackets or quotes in it, and else more than that."""
    return text.count(b"{") + text.count(b"[") + text.count(b'"') // 2


def _too_slow(message: str) -> ApiError:
    return ApiError(408, message, code="body_timeout", headers={"connection": "close"})
