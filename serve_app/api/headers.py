"""Names of the headers with which a client asks for a resumable stream, and of the one that names it."""

from __future__ import annotations

RESUME_HEADER = "x-stream-resume"
RESUME_QUERY = "resume"
STREAM_ID_HEADER = "x-stream-id"
LAST_EVENT_ID_HEADER = "last-event-id"
