"""Who may come in: finds the caller of a request by its API key, before the request is read.

Promises that nothing but `/health` and the chat page's files is answered without a key where the service asks for keys,
and that a key stands in no answer and no log. Knows no endpoint.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import secrets
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Scope

from serve_app.access.caller import ANONYMOUS, Caller
from serve_app.access.guessing import Guesses, TooManyGuesses
from serve_app.access.keys import ApiKeys, ExpiredKey, UnknownKey
from serve_app.api.errors import ApiError
from serve_app.api.http.chat_page import is_open
from serve_app.api.http.pages import is_loopback
from serve_app.api.http.slow_bodies import client_of

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key: whoever supervises a process has none, and learns only that it answers."""
PROBE_SECRET = "SERVE_APP_PROBE_SECRET"
"""Environment variable: what `serve-app serve` presents as its key to ask /ready, and nothing else."""
_READY = "/ready"
_PROBE = Caller(name="serve-app", tenant="serve-app")
_PAGES = ("/docs", "/openapi.json")
"""Where a browser may send the key as the password of HTTP's Basic scheme. A browser adds it by itself to later
requests, also to those that a page of another site causes, so it is taken for nothing that works or tells a secret."""
_REALM = 'realm="serve_app"'
_HOW = "Send it as `Authorization: Bearer KEY`, or in the header x-api-key."


@dataclass(frozen=True, slots=True)
class Guard:
    """The keys of one service."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    guesses: Guesses = field(default_factory=Guesses)
    bound_to: str | None = None
    """The host that the service listens on; None: not known."""
    probe_secret: str = ""
    """See `PROBE_SECRET`; empty: nobody has it."""

    @property
    def warning(self) -> str:
        """What the operator should know; "" if there is nothing."""
        if self.keys.required or self.bound_to is None or is_loopback(self.bound_to):
            return ""
        return (
            f"everybody who reaches {self.bound_to} can use this service, because it asks for no API key; "
            "make one with `serve-app keys create` and set auth.keys_file"
        )

    def caller(self, scope: Scope, path: str, headers: Headers) -> Caller:
        """Who asks. `path`: below the application's prefix. Raises `ApiError`: 401, and 429 after many wrong keys."""
        if not self.keys.required or path in OPEN_PATHS or is_open(scope["method"], path):
            return ANONYMOUS
        page = _is_page(scope["method"], path)
        presented = _presented(headers, basic=page)
        if not presented:
            raise _unauthorized(f"This service asks for an API key, and the request has none. {_HOW}", page)
        if path == _READY and self.probe_secret and _equal(presented, self.probe_secret):
            return _PROBE
        address = client_of(scope["client"][0]) if scope.get("client") else None
        try:
            try:
                key = self.keys.find(presented)
            except UnknownKey:
                self.guesses.wrong(address, presented)
                raise _unauthorized("The API key is wrong: mistyped, or revoked.", page, wrong=True) from None
            except ExpiredKey:
                raise _unauthorized("The API key has expired; ask for a new one.", page, wrong=True) from None
            self.guesses.right(address, key.caller.name)
        except TooManyGuesses as wait:
            message = "Too many different wrong API keys came from this address; wait before you try another one."
            raise ApiError(429, message, code="too_many_wrong_keys", retry_after_s=wait.retry_after_s) from None
        return key.caller

    def described(self, caller: Caller) -> dict[str, object]:
        """What /ready says of access. A key's holder with the admin flag also sees how the keys are."""
        document: dict[str, object] = {"keys_required": self.keys.required}
        if self.warning:
            document["warning"] = self.warning
        if caller.admin:
            document |= {"keys": len(self.keys), "keys_fault": self.keys.fault or None}
        return document


def _is_page(method: str, path: str) -> bool:
    return method in ("GET", "HEAD") and any(path == page or path.startswith(f"{page}/") for page in _PAGES)


def _presented(headers: Headers, *, basic: bool) -> str:
    """The key in a request's headers; "" without one. `basic`: the password of the Basic scheme is one too."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    scheme, value = scheme.lower(), value.strip()
    if scheme == "bearer" and value:
        return value
    if key := headers.get("x-api-key", "").strip():
        return key
    return _password(value) if scheme == "basic" and basic else ""


def _password(encoded: str) -> str:
    """The password, or the user's name where the password is empty."""
    try:
        user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return ""
    return password or user


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def _unauthorized(message: str, page: bool, *, wrong: bool = False) -> ApiError:
    """401 with the challenge by which a client knows what to send (RFC 9110, 11.6.1; for Bearer RFC 6750, 3)."""
    challenge = f"Bearer {_REALM}" + (', error="invalid_token"' if wrong else "")
    if page:
        challenge = f'Basic {_REALM}, charset="UTF-8"'  # a browser asks its user; the key is the password
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})


def new_probe_secret() -> str:
    """A value for `PROBE_SECRET`."""
    return secrets.token_urlsafe(32)
