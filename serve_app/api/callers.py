"""Who a caller is, as far as what is kept for them is concerned: a digest of their credentials.

Promises that a store holds no API key, and that two digests of one caller can't be linked. Knows no endpoint.
"""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers


def caller_digest(kept_id: str, headers: Headers) -> str:
    """Who may read what is kept under `kept_id`. It differs from id to id."""
    return hmac.digest(kept_id.encode(), credentials(headers).encode(), hashlib.sha256).hex()


def is_caller(digest: str, kept_id: str, headers: Headers) -> bool:
    """Whether the credentials in `headers` are those of the digest. Takes the same time whatever they are."""
    return hmac.compare_digest(digest, caller_digest(kept_id, headers))


def credentials(headers: Headers) -> str:
    """What a caller presents: a bearer token, the same key in `x-api-key` (Anthropic's header for it), or another
    kind of `Authorization`. " " if it presents nothing."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if not scheme and (key := headers.get("x-api-key", "").strip()):
        return key
    return token.strip() if scheme.lower() == "bearer" else f"{scheme} {token}"
