"""How many more requests each replica can start now, from what it reports and what this ingress has sent it since.

Promises that a replica gets no more requests than it has places, and a few more so that it never idles between the end
of one and the arrival of the next. Pure: knows no clock and no thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from serve_app.access.entry import Entry
from serve_app.core import Priority, ReplicaLoad
from serve_app.fair_queue import may_take_from

PLACES_PER_SPARE = 32
"""For so many places a replica gets one request more than it can start, and one at least. An ended request gives its
place back some milliseconds after the engine could have used it, and seldom do more than one in 32 end in a step."""


@dataclass(slots=True)
class _Replica:
    limit: int
    """Requests that the replica takes at once; 0 when it has gone."""
    ours: dict[Entry, bool] = field(default_factory=dict)
    """Requests with a place there -> whether the replica has accepted them."""
    batch: int = 0
    """Those of the class `BATCH`."""
    tenants: Counter[tuple[str, float]] = field(default_factory=Counter)
    """(tenant, weight) -> the others of them."""
    sent: int = 0
    """Those that are on their way, or accepted."""
    others: int = 0
    """Requests of other ingresses, as far as is known."""
    load: ReplicaLoad | None = None
    new_tokens: int = 0
    """Tokens of the prompts that it got after that report."""
    rejected: bool = False
    """It has refused a request since its last report: it has fewer places than is known here."""


class Capacity:
    """The replicas of one deployment, as one ingress knows them."""

    def __init__(self) -> None:
        self._places: int | None = None
        self._shared = False
        self.spares = True
        """Replicas get their spare requests: a place falls free soon."""
        self._replicas: dict[str, _Replica] = {}
        self._at: dict[Entry, _Replica] = {}

    def configure(self, places: int | None, *, shared: bool) -> None:
        """`places`: of a replica that has not reported. None: all that Serve lets it have. `shared`: there may be
        other ingresses. At a replica that reports nothing this one leaves them the last place, if it has another."""
        self._places, self._shared = places, shared

    @property
    def open(self) -> bool:
        """There is a replica that takes requests."""
        return any(replica.limit for replica in self._replicas.values())

    def update(self, limits: Mapping[str, int]) -> None:
        """Set the live replicas and how many requests Serve lets each have."""
        for name, limit in limits.items():
            self._replicas.setdefault(name, _Replica(limit)).limit = limit
        for name in self._replicas.keys() - limits.keys():
            self._replicas[name].limit = 0
            self._replicas[name].load = None
            if not self._replicas[name].ours:
                del self._replicas[name]

    def loaded(self, name: str, load: ReplicaLoad | None) -> None:
        """A replica has reported, maybe before `update` names it. None: it can report no more."""
        replica = self._replicas.setdefault(name, _Replica(0))
        replica.load = load
        replica.rejected = False
        if load is not None:
            replica.others = max(0, load.running + load.waiting - replica.sent)
            replica.new_tokens = sum(entry.prompt_tokens for entry, accepted in replica.ours.items() if not accepted)

    def loads(self) -> Iterator[ReplicaLoad]:
        """The newest report of each replica that sends any."""
        return (replica.load for replica in self._replicas.values() if replica.load is not None)

    def rooms(self, entry: Entry, *, leaves: int = 0) -> dict[str, int]:
        """Replicas that can start this request now -> the number of their requests. `leaves`: how many places must be
        left, over all replicas."""
        leaves = self._leaves_each(leaves)
        return {
            name: len(replica.ours) + replica.others
            for name, replica in self._replicas.items()
            if (self._room(replica, entry.priority, leaves) > 0 and _has_memory(replica, entry.prompt_tokens))
            or self._is_made_way_for(replica, *entry.payer, entry.priority)
        }

    def free(self, priority: Priority, *, leaves: int = 0) -> int:
        """Requests of this class that could start at once, memory aside. `leaves`: see `rooms`."""
        leaves = self._leaves_each(leaves)
        return sum(max(0, self._room(one, priority, leaves)) for one in self._replicas.values())

    def have_made_way(self) -> int:
        """Interactive requests that have places and go on only when others end."""
        spares = self.spares
        waiting = ((self._have_made_way(one) or 0, _spare(self._limit(one))) for one in self._replicas.values())
        return sum(max(0, number - spare) if spares else number for number, spare in waiting)

    def makes_way(self, tenant: str, weight: float, priority: Priority) -> bool:
        """Whether a request of this tenant could start at once since one of another tenant would yield to it."""
        return any(self._is_made_way_for(one, tenant, weight, priority) for one in self._replicas.values())

    def _leaves_each(self, leaves: int) -> int:
        return -(-leaves // max(1, sum(replica.limit > 0 for replica in self._replicas.values())))

    def others(self) -> int:
        """Requests of other ingresses at all replicas."""
        return sum(replica.others for replica in self._replicas.values())

    def take(self, entry: Entry, name: str) -> bool:
        """The request has a place at this replica. Returns whether it starts at once, and is no spare one."""
        replica = self._at[entry] = self._replicas[name]
        places = self._places if replica.load is None else replica.load.places
        used = len(replica.ours) + replica.others - (replica.batch if entry.priority is Priority.INTERACTIVE else 0)
        starts = places is None or used < places or self._is_made_way_for(replica, *entry.payer, entry.priority)
        replica.ours[entry] = False
        if entry.priority is Priority.BATCH:
            replica.batch += 1
        else:
            replica.tenants[entry.payer] += 1
        replica.new_tokens += entry.prompt_tokens
        return starts

    def sent(self, entry: Entry) -> None:
        """The request is on its way to the replica of its place."""
        if (replica := self._at.get(entry)) is not None:
            replica.sent += 1

    def told(self, name: str, ongoing: int) -> None:
        """The replica answered a request: it has `ongoing` ones, including that one if it accepted it.

        Its reports say that better, if it sends any: a call to it ends a moment later than its request.
        """
        if (replica := self._replicas.get(name)) is not None and replica.load is None:
            replica.others = max(0, ongoing - sum(replica.ours.values()))

    def accepted(self, entry: Entry) -> None:
        """The replica has accepted the request; `told` was called for the same answer just before."""
        if (replica := self._at.get(entry)) is not None and not replica.ours[entry]:
            replica.ours[entry] = True
            if replica.load is None:
                replica.others = max(0, replica.others - 1)

    def rejected(self, entry: Entry) -> None:
        """The replica of the request's place has refused it: others hold what seemed to be free."""
        if (replica := self._at.get(entry)) is not None and not replica.ours[entry]:
            replica.rejected = True
            replica.others = max(replica.others, replica.limit - len(replica.ours) + 1)

    def free_place(self, entry: Entry, *, sent: bool) -> Entry | None:
        """The request holds no place any more. `sent` was called for it, or not. Returns the spare one that starts now,
        if there is any."""
        if (replica := self._at.pop(entry, None)) is None:
            return None
        del replica.ours[entry]
        if entry.priority is Priority.BATCH:
            replica.batch -= 1
        else:
            replica.tenants[entry.payer] -= 1
            replica.tenants += Counter()  # drops those that have none
        replica.sent -= sent
        if entry.began_at is None:
            return None
        return next((one for one in replica.ours if one.began_at is None), None)

    def doubtful(self) -> bool:
        """Whether a replica may have more places than it seems: nothing will tell when others give one back."""
        return any(one.limit and one.others and (one.load is None or one.rejected) for one in self._replicas.values())

    def try_again(self) -> None:
        """Let one request try each replica whose places others seem to hold, if nothing would tell that they don't."""
        for one in self._replicas.values():
            if one.load is None or one.rejected:
                one_free = self._limit(one) - len(one.ours) - self._left_to_others(one) - 1
                one.others = min(one.others, max(0, one_free))

    def _limit(self, replica: _Replica) -> int:
        places = self._places if replica.load is None else replica.load.places
        if places is None:
            return replica.limit
        return min(replica.limit, places + (_spare(places) if self.spares else 0))

    def _room(self, replica: _Replica, priority: Priority, leaves: int) -> int:
        used = len(replica.ours) + replica.others
        # Its engine preempts batch requests for an interactive one.
        yields = replica.batch if priority is Priority.INTERACTIVE else 0
        room = self._limit(replica) - used + yields - self._left_to_others(replica)
        if leaves:
            # Beside the spare ones, whose requests wait in its engine. The tenant itself gets half of all at least.
            limit = self._limit(replica)
            room -= min((_spare(limit) if self.spares else 0) + leaves, limit // 2)
        return min(room, replica.limit - used)

    def _is_made_way_for(self, replica: _Replica, tenant: str, weight: float, priority: Priority) -> bool:
        """Whether the replica's engine would preempt a request of another tenant, which has more than its share there,
        for a new one of this tenant. Those that have made way already are still among the other tenant's."""
        used = len(replica.ours) + replica.others
        have_made_way = self._have_made_way(replica)
        if priority is Priority.BATCH or used >= replica.limit or have_made_way is None:
            return False
        taken = replica.tenants[tenant, weight]
        return any(
            may_take_from(taken, weight, holds - have_made_way, others_weight)
            for (other, others_weight), holds in replica.tenants.items()
            if other != tenant
        )

    def _have_made_way(self, replica: _Replica) -> int | None:
        """Its interactive requests that wait in its engine since others came; None where its places are not known."""
        places = self._places if replica.load is None else replica.load.places
        return None if places is None else max(0, len(replica.ours) + replica.others - replica.batch - places)

    def _left_to_others(self, replica: _Replica) -> int:
        return int(self._shared and replica.load is None and len(replica.ours) > 0)


def _spare(places: int) -> int:
    return max(1, places // PLACES_PER_SPARE)


def _has_memory(replica: _Replica, prompt_tokens: int) -> bool:
    """Whether the prompt fits into the KV cache beside those that are there. If none is, the engine has to say so."""
    load = replica.load
    if load is None or (load.running + load.waiting == 0 and not replica.ours):
        return True
    return load.free_tokens - load.waiting_tokens - replica.new_tokens >= prompt_tokens
