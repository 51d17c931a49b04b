"""What one client of a chaos run saw, and the ways in which a connection can end before its answer does."""

from __future__ import annotations

from dataclasses import dataclass, field

from loadtest.verdicts import Answer
from loadtest.workload import Visit


@dataclass(slots=True)
class Outcome:
    """What one client saw. Times are of `time.monotonic`."""

    visit: Visit
    began_s: float
    ended_s: float = 0.0
    answer: Answer | None = None
    failure: str | None = None
    """Why there is no answer."""
    broken: list[tuple[float, str]] = field(default_factory=list)
    """Connections that ended without the client's doing, as it was told."""
    refused: int = 0
    """429 and 503 with Retry-After."""
    cut_s: list[float] = field(default_factory=list)
    """When the client dropped its own connection."""
    resumed: int = 0
    faults: list[str] = field(default_factory=list)
    """Of the wire: events that were repeated, left out or out of place."""
    repeated_events: bool = False
    arrivals_s: list[float] = field(default_factory=list)
    """Of events of the answer that it ended with."""
    request_ids: list[str] = field(default_factory=list)
    """Its own, one for each time it asked."""
    stream_id: str = ""
    """The service's, of a stream that can be resumed. Of a response it is the part of its id after `resp_`."""


class Broken(Exception):
    """The connection ended before the answer did: a transport error, or an answer of 5xx."""


class Refused(Exception):
    """The server said when to try again, before it had accepted anything."""


class Cut(Exception):
    """The client has dropped its own connection."""


def ended_as_if_whole() -> Broken:
    """The body had an end in order, and the answer in it had none."""
    return Broken("the body ended, as if it were whole, before the last event")
