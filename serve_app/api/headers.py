"""Names of headers: those with which a client asks for a resumable stream, the one that names it, and its own limit."""

from __future__ import annotations

RESUME_HEADER = "x-stream-resume"
RESUME_QUERY = "resume"
STREAM_ID_HEADER = "x-stream-id"
TIMEOUT_HEADER = "x-request-timeout"
"""Seconds that the client gives the whole request."""
LAST_EVENT_ID_HEADER = "last-event-id"
