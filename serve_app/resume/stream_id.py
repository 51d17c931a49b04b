"""Ids of resumable streams. Whoever has one may read the stream, so they can't be guessed and are never logged whole.

Imports no other module.
"""

from __future__ import annotations

import secrets

ID_BYTES = 16
"""Of randomness in an id."""
_SHOWN = 8
"""Characters of an id that may be shown: enough to find a stream in a log; 80 of its 128 bits stay unknown."""


def new_stream_id() -> str:
    """22 characters of base64url."""
    return secrets.token_urlsafe(ID_BYTES)


def loggable(stream_id: str) -> str:
    """How a stream is named in logs, errors and task names: by the beginning of its id."""
    return f"{stream_id[:_SHOWN]}…"
