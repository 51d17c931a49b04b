"""Who a caller is, as far as what is kept for them is concerned: a digest of their tenant or of their credentials.

Promises that a store holds no API key, and that two digests of one caller can't be linked. Knows no endpoint.
"""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers

from serve_app.api.http.endpoint import Call


def caller_digest(kept_id: str, call: Call) -> str:
    """Who may read what is kept under `kept_id`. It differs from id to id."""
    return hmac.digest(kept_id.encode(), _identity(call).encode(), hashlib.sha256).hex()


def is_caller(digest: str, kept_id: str, call: Call) -> bool:
    """Whether the digest is that of the call's caller. Takes the same time whatever they present."""
    return hmac.compare_digest(digest, caller_digest(kept_id, call))


def _identity(call: Call) -> str:
    """The tenant, so that a renewed key finds what an earlier one began; without keys what the caller presents.

    The two are never the same: no header has a line feed.
    """
    tenant = call.caller.tenant
    return f"\ntenant\n{tenant}" if tenant else credentials(call.headers)


def credentials(headers: Headers) -> str:
    """What a caller presents: a bearer token, the same key in `x-api-key` (Anthropic's header for it), or another
    kind of `Authorization`. " " if it presents nothing."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if not scheme and (key := headers.get("x-api-key", "").strip()):
        return key
    return token.strip() if scheme.lower() == "bearer" else f"{scheme} {token}"
