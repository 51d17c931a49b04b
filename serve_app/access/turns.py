"""The order of the requests that wait at one ingress.

What has begun comes first, then what a replica has sent back, then the tenants by turns. Pure: knows no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from serve_app.access.entry import Entry
from serve_app.core import Fingerprint, Priority
from serve_app.fair_queue import FairQueue


class Turns:
    """Those that wait. Each set of weights has its own queue: its replicas can not serve the first of another."""

    def __init__(self) -> None:
        self._front: list[Entry] = []
        self._queues: dict[Fingerprint, FairQueue[Entry]] = {}
        self._users: Counter[Fingerprint] = Counter()
        """How many entries each queue has, those that have started included."""

    def __bool__(self) -> bool:
        """Somebody waits."""
        return bool(self._front) or any(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Entry]:
        """All that wait."""
        yield from self._front
        for queue in self._queues.values():
            yield from queue

    def wait(self, entry: Entry) -> None:
        """Let the entry wait: in its tenant's order if it is new, before all others if it has begun or comes back."""
        if entry.request is None or entry.begun or entry.charged:
            self._front.append(entry)
            self._front.sort(key=lambda one: (not one.begun, one.came_at))
            return
        request = entry.request
        self._users[request.fingerprint] += 1
        entry.queued = True
        self._queues.setdefault(request.fingerprint, FairQueue()).add(
            entry, tokens=entry.tokens, tenant=request.tenant, weight=request.weight, priority=request.priority
        )

    def start(self, entry: Entry) -> None:
        """The entry's wait is over: its tenant is charged."""
        if entry.queued and entry.request is not None:
            self._queues[entry.request.fingerprint].start(entry)
            entry.queued, entry.charged = False, True
        elif entry in self._front:
            self._front.remove(entry)

    def leave(self, entry: Entry, tokens: int) -> None:
        """The entry has ended, or waits no more. `tokens`: what it did cost."""
        if not (entry.queued or entry.charged):
            if entry in self._front:
                self._front.remove(entry)
            return
        assert entry.request is not None
        fingerprint = entry.request.fingerprint
        if entry.queued:
            self._queues[fingerprint].remove(entry)
        else:
            self._queues[fingerprint].end(entry, tokens)
            if entry in self._front:
                self._front.remove(entry)
        entry.queued = entry.charged = False
        self._users[fingerprint] -= 1
        if not self._users[fingerprint]:
            del self._users[fingerprint], self._queues[fingerprint]

    def lanes(self) -> Iterator[Iterator[Entry]]:
        """Lanes of those that wait, in the order of their turns: where one can't start, the rest of its lane waits.

        To pass over one, go on to the next: it is of another tenant.
        """
        yield from [iter((entry,)) for entry in self._front]
        yield from [_lane(queue) for queue in self._queues.values()]

    def before(self, tenant: str, weight: float, priority: Priority, fingerprint: Fingerprint) -> float:
        """How many of those that wait would start before a new request."""
        queue = self._queues.get(fingerprint)
        if queue is None or not queue.waiting_tokens:
            return len(self._front)
        share = queue.tokens_before(tenant, weight, priority) / queue.waiting_tokens
        return len(self._front) + share * len(queue)


def _lane(queue: FairQueue[Entry]) -> Iterator[Entry]:
    while (entry := queue.first()) is not None:
        yield entry
        if entry in queue:
            break
    passed = {entry}
    while (entry := next((one for one in queue.firsts() if one not in passed), None)) is not None:
        yield entry
        if entry in queue:
            passed.add(entry)
