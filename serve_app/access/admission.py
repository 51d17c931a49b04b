"""Whether a request may wait for a place at a replica, or is told at once that it would take too long.

Promises that a request is refused before it has waited if it would not start in time, as far as that can be told, and
that nothing is refused that has started. Pure: the clock is handed in, and it knows no Ray and no event loop. The
methods may be called from any thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from serve_app.access.capacity import Capacity
from serve_app.access.entry import Entry, Group
from serve_app.access.outlook import START_ANSWER_TOKENS, Outlook
from serve_app.access.pace import FULL_SHARE
from serve_app.access.shares import Shares
from serve_app.access.turns import Turns
from serve_app.core import Failure, FailureCode, Fingerprint, GenerationRequest, Priority, ReplicaLoad
from serve_app.fair_queue import ExpectedTokens

MAX_WAIT_S = 10.0
"""See `AdmissionConfig.max_wait_s`."""
LONGEST_RETRY_S = 60.0
"""The longest `Retry-After`: OpenAI's clients ignore a longer one."""
SPARE_WITHIN_S = 1.0
"""A replica gets its spare request when a place is expected to fall free within this time."""
SHORTEST_S = 1.0
"""A request that was let in waits for so long at least: a free place is its within milliseconds, on an idle machine."""
HOPED_SHARE = 0.75
"""A request is let in whose wait is estimated to be at most this share of what it may wait: estimates scatter."""
MOST_SHARE = 0.9
"""A request waits here for this share at most. The rest is for its wait in the replica, as a spare one."""


class Admission:
    """All requests of one ingress for one deployment: those that wait, and those that have places."""

    def __init__(self, max_wait_s: float = MAX_WAIT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_wait_s = max_wait_s
        self.capacity = Capacity()
        self.turns = Turns()
        self.lock = threading.RLock()
        """Hold it while using `capacity` or `turns`."""
        self.changed: Callable[[], object] = lambda: None
        """Called, on any thread, when somebody who waits may have a turn now."""
        self.blocked = False
        """Somebody waits though there are places: for memory."""
        self.refused: Counter[str] = Counter()
        """Requests refused so far, by reason: `full`, `over_share` or `late`."""
        self._clock = clock
        self._fingerprint = Fingerprint("")
        """The weights that the newest request wants."""
        self._outlook = Outlook()
        self._expected = ExpectedTokens()
        self._any_ended = False
        self._entries: dict[int, Entry] = {}
        self._groups: dict[int, Group] = {}
        self._placed: dict[Entry, None] = {}
        self._placements = 0
        self._shares = Shares()
        self._turned_away = 0.0
        """Requests that were refused and are expected back, as far as their `Retry-After` says."""
        self._turned_away_at = clock()

    # ---- requests ----

    def enter(self, request: GenerationRequest) -> Entry | Failure:
        """Let a new attempt wait; `leave` must be called for its entry. Or refuse it, if it would not start in time.

        The choices of one request are known by their common `sampling`: where one is let in, so are the others.
        """
        with self.lock:
            now = self._clock()
            group = self._groups.get(id(request.sampling), Group())
            entry = Entry(request, group, now)
            if not (entry.begun or group.entries):
                wait_s = self._wait_s(request.tenant, request.weight, request.priority, request.fingerprint)
                if wait_s > HOPED_SHARE * self._most_s(request.remaining_s):
                    return self._refuse(request.tenant, wait_s)
            self._add(entry, request)
            return entry

    def stray(self, request: object) -> Entry:
        """The entry of a request that came in another way: it waits its turn. `leave` must be called for it."""
        with self.lock:
            entry = Entry(None, Group(), self._clock())
            if isinstance(request, GenerationRequest):
                entry.request = request
                self._add(entry, request)
            else:
                self.turns.wait(entry)
            return entry

    def find(self, request: object) -> Entry | None:
        """The entry of a request, by the object's identity."""
        return self._entries.get(id(request))

    @contextmanager
    def keeping(self, entry: Entry) -> Iterator[None]:
        """The entry leaves at the end of the block."""
        try:
            yield
        finally:
            self.leave(entry)

    def leave(self, entry: Entry) -> None:
        """The attempt has ended, with as many tokens as its `new_tokens` says."""
        new_tokens = entry.new_tokens
        with self.lock:
            request, waits = entry.request, entry.placed_at is None
            self._unplace(entry)
            self.turns.leave(entry, entry.prompt_tokens + (new_tokens or 0) if not waits else 1)
            if request is not None and self._entries.pop(id(request), None) is not None:
                self._subtract(entry, request)
                if new_tokens and entry.placed_at is not None:
                    began_at = entry.placed_at if entry.began_at is None else entry.began_at
                    self._outlook.pace.ended(self._clock() - began_at, new_tokens, full=entry.full)
                    self._expected.ended(request.tenant, new_tokens + len(request.output_token_ids))
                    self._any_ended = True
        if waits:
            self.changed()

    def refusable(self, entry: Entry) -> bool:
        """Whether it may still be refused for waiting: it is new, and no choice of its request has had a place.

        Nobody is refused while there is no replica: that is no full service, and one will come.
        """
        with self.lock:
            return self.capacity.open and not (entry.begun or entry.group.started)

    def patience_s(self, entry: Entry) -> float:
        """How much longer the entry may wait."""
        remaining_s = None if entry.request is None else entry.request.remaining_s
        return entry.came_at + max(SHORTEST_S, MOST_SHARE * self._most_s(remaining_s)) - self._clock()

    def late(self, entry: Entry) -> Failure | None:
        """The refusal of an entry that was let in by a wrong estimate and has waited too long; None for any other."""
        with self.lock:
            if entry.request is None or not self.refusable(entry) or self.patience_s(entry) > 0:
                return None
            request = entry.request
            wait_s = self._wait_s(request.tenant, request.weight, request.priority, request.fingerprint)
            return self._refuse(request.tenant, max(wait_s, self._clock() - entry.came_at), late=True)

    def refusal(
        self, tenant: str, weight: float, remaining_s: float | None, priority: Priority = Priority.INTERACTIVE
    ) -> Failure | None:
        """The refusal of a request that would be refused now; None if it would be let in."""
        with self.lock:
            wait_s = self._wait_s(tenant, weight, priority, self._fingerprint)
            return self._refuse(tenant, wait_s) if wait_s > HOPED_SHARE * self._most_s(remaining_s) else None

    # ---- places ----

    def update(self, limits: Mapping[str, int]) -> None:
        """Set the live replicas; see `Capacity.update`."""
        with self.lock:
            self.capacity.update(limits)

    def loaded(self, replica: str, load: ReplicaLoad | None) -> None:
        """A replica has reported; see `Capacity.loaded`."""
        with self.lock:
            self.capacity.loaded(replica, load)
            self._outlook.pace.reported(self.capacity.loads(), self._clock())
            waits = bool(self.turns)
        if waits:
            self.changed()

    def rounds(self) -> Iterator[None]:
        """Once for the free places, and once more for spare requests, if they will start soon.

        Of many that came at once all end at once, and a spare one would wait for them where nobody can refuse it.
        """
        self.capacity.spares = False
        yield
        self._look_ahead()
        if self.capacity.spares:
            yield

    def _look_ahead(self) -> None:
        self._outlook.look(self._placed, self.turns, self.capacity.others(), self._clock(), self._placements)
        self.capacity.spares = self._outlook.first_s <= SPARE_WITHIN_S

    def place(self, entry: Entry, replica: str) -> None:
        """The entry has a place at this replica from now on."""
        self.turns.start(entry)
        starts = self.capacity.take(entry, replica)
        self._placed[entry] = None
        self._placements += 1
        if entry.request is not None:
            self._shares.placed(entry.request.tenant)
        entry.placed_at = self._clock()
        entry.began_at = entry.placed_at if starts else None
        entry.full = self.capacity.free(entry.priority) < (1 - FULL_SHARE) * len(self._placed)
        entry.group.started = True

    def give_back(self, entry: Entry, *, sent: bool) -> None:
        """The entry's place is free. `sent`: it was on its way to the replica."""
        if (spare := self.capacity.free_place(entry, sent=sent)) is not None:
            spare.began_at = self._clock()
        self._unplace(entry)

    def come_back(self, entry: Entry) -> None:
        """The replica of the entry's place has refused it: it is the next to get another one."""
        entry.placed_at = entry.began_at = None
        if entry.request is None or self.find(entry.request) is entry:
            self.turns.wait(entry)

    def leaves(self, tenant: str, weight: float) -> int:
        """How many places the tenant has to leave free for others; see `Shares`."""
        return self._shares.to_leave(tenant, weight, self._clock())

    @property
    def several_tenants(self) -> bool:
        """Where one of them can't start, one of another may: somebody would make way for it."""
        return self._shares.several

    # ---- for metrics ----

    def waiting(self) -> Counter[Priority]:
        """How many wait, by class."""
        with self.lock:
            return Counter(entry.priority for entry in self.turns)

    def expected_wait_s(self) -> float:
        """How long an interactive request of a tenant that has no others here would wait."""
        with self.lock:
            return self._wait_s("", 1.0, Priority.INTERACTIVE, self._fingerprint)

    # ---- inside ----

    def _add(self, entry: Entry, request: GenerationRequest) -> None:
        most = request.max_new_tokens - len(request.output_token_ids)
        entry.answer_tokens = self._expected.of(
            request.tenant, most if self._any_ended else min(most, START_ANSWER_TOKENS)
        )
        self._groups[id(request.sampling)] = entry.group
        entry.group.entries += 1
        self._entries[id(request)] = entry
        self._fingerprint = request.fingerprint
        self._shares.came(request.tenant, request.weight, entry.tokens, entry.came_at)
        self.turns.wait(entry)

    def _unplace(self, entry: Entry) -> None:
        if entry in self._placed:
            del self._placed[entry]
            if entry.request is not None:
                self._shares.unplaced(entry.request.tenant)

    def _subtract(self, entry: Entry, request: GenerationRequest) -> None:
        entry.group.entries -= 1
        if entry.group.entries == 0:
            del self._groups[id(request.sampling)]
        self._shares.left(request.tenant, entry.tokens)

    def _most_s(self, remaining_s: float | None) -> float:
        return self.max_wait_s if remaining_s is None else min(self.max_wait_s, remaining_s)

    def _wait_s(self, tenant: str, weight: float, priority: Priority, fingerprint: Fingerprint) -> float:
        """How long a new request would wait for its start, if no others came."""
        self._look_ahead()
        free = 0 if self.blocked else self.capacity.free(priority, leaves=self.leaves(tenant, weight))
        before = math.ceil(self.turns.before(tenant, weight, priority, fingerprint))
        at_once = before == 0 and self.capacity.makes_way(tenant, weight, priority)
        turn = before + self.capacity.have_made_way() - free
        if turn < 0 or at_once or not self.capacity.open:
            return 0.0
        return self._outlook.wait_s(turn)

    def _refuse(self, tenant: str, wait_s: float, *, late: bool = False) -> Failure:
        over = self._shares.has_too_much(tenant)
        self.refused["late" if late else "over_share" if over else "full"] += 1
        retry_s = self._retry_after_s(wait_s)
        if over:
            message = (
                "Your requests have more than their share of this service, and others wait; another one would wait for "
                f"about {wait_s:.0f} s. Try again in {retry_s:.0f} s."
            )
            return Failure(FailureCode.OVER_SHARE, message, retry_after_s=retry_s)
        message = f"The service is full: a request would wait for about {wait_s:.0f} s. Try again in {retry_s:.0f} s."
        return Failure(FailureCode.OVERLOADED, message, retry_after_s=retry_s)

    def _retry_after_s(self, wait_s: float) -> float:
        """When a request that is refused now would be let in: each that is refused comes behind those before it."""
        now = self._clock()
        per_s = self._outlook.requests_per_s
        gone = (now - self._turned_away_at) * per_s
        self._turned_away_at = now
        self._turned_away = max(0.0, self._turned_away - gone) + 1
        excess_s = max(0.0, wait_s - self.max_wait_s)
        return min(LONGEST_RETRY_S, max(1.0, excess_s + self._turned_away / per_s))
