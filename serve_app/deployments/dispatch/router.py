"""Chooses the model replica for each request, and tells the ingress where its requests are and which replicas live.

Promises that a request goes to a replica of its own weights that is neither leaving nor silent, if there is one, and
that it waits for a place without asking for one again and again. Serve's own router keeps trying, and a full replica
logs each refusal. Serve pickles this module by value, so it can hold no state: that is in `replica_directory`. Knows no
stream.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.core import Fingerprint, GenerationRequest
from serve_app.deployments.dispatch.directory import ReplicaDirectory, replica_directory
from serve_app.deployments.dispatch.places import Places
from serve_app.deployments.ray_internals import cancel, deployment_name

FINGERPRINT_KEY = "fingerprint"
"""Key of the weights' fingerprint in a replica's metadata (`ModelServer.record_replica_metadata`)."""
NUMERICS_KEY = "numerics_id"
"""Key of `numerics_id` in a replica's metadata; empty if the replica is not batch-invariant."""
CHANNEL_KEY = "channel"
"""Key of the address of its token channels (`channel_wire.ChannelAddress`) in a replica's metadata."""


class ModelRouter(RequestRouter):
    """The power of two choices, among the replicas that can serve the request and have room for it."""

    def initialize_state(self, *, shared: bool = False, places: int | None = None, **kwargs: Any) -> None:
        """Called by Serve once, before it names any replica. `shared`: other processes may have routers too.
        `places`: requests that a replica computes at once, until it says so itself."""
        self._directory = replica_directory(self.app_name, deployment_name(self))
        self._directory.admission.capacity.configure(places, shared=shared)
        self._places = Places(self._directory.admission)

    @property
    def max_num_routing_tasks(self) -> int:
        """One for each request: all wait in `choose_replicas`. Serve's lower limit is for tasks that query replicas."""
        return self.num_pending_requests

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """Called by Serve for each new replica."""
        return _Replica(replica_info, self._directory, self._places)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with the replicas that take requests, whenever they change."""
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a request or a probe met a dead replica, before Serve's controller knows of it."""
        super().on_replica_actor_died(replica_id)
        self._directory.died(replica_id.unique_id)
        self._publish()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when the replica has accepted the request: it is sent nowhere else from here on."""
        self._places.accepted(pending_request.metadata.internal_request_id)
        args = pending_request.args
        if args and not self._directory.taken(args[0], replica_id.unique_id, result):
            cancel(result)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Called by Serve when a replica has accepted a request, before `on_request_routed`, or rejected it."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._places.told(replica_id.unique_id, num_ongoing_requests)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has left the replica that it was sent to, for whatever reason."""
        super().on_request_completed(replica_id, internal_request_id)
        self._places.completed(internal_request_id)

    def _publish(self) -> None:
        replicas = {replica.replica_id.unique_id: replica for replica in self.curr_replicas.values()}
        self._directory.update(
            {name: _fingerprint(replica) for name, replica in replicas.items()},
            {name: _numerics_id(replica) for name, replica in replicas.items()},
            {name: str(replica.replica_metadata.get(CHANNEL_KEY, "")) for name, replica in replicas.items()},
        )
        self._places.update({name: replica.max_ongoing_requests for name, replica in replicas.items()})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica at which the request has a place from now on, as soon as there is one.

        The order is that of `access.turns`. Serve calls this again when the replica has refused the request.
        """
        if pending_request is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        request = pending_request.args[0] if pending_request.args else None
        self._directory.waiting(request)
        key = pending_request.metadata.internal_request_id
        replica = await self._places.take(key, request, partial(self._choose, request))
        # When this future is done, Serve sends the request before the callback runs, unless the request was given up.
        pending_request.future.add_done_callback(lambda _: self._places.unsent(key))
        chosen = [one for one in self.curr_replicas.values() if one.replica_id.unique_id == replica]
        for one in chosen:
            if self.replica_queue_len_cache.get(one.replica_id) is None:
                # After 10 s without news Serve would ask the replica first, once for each request of a burst.
                self.replica_queue_len_cache.update(one.replica_id, 0)
        return [chosen]

    def _choose(self, request: object, load: Mapping[str, int]) -> str | None:
        """A replica of `load` (those with room -> their numbers of requests); None if the request should wait.

        Of two random replicas, the one with fewer requests: if all routers took the least loaded one, many would choose
        the same.

        If no replica has the request's weights, any one may refuse it: a request must not wait for a replica that may
        never come. A begun output goes to a replica with the same `numerics_id`, if there is one.
        """
        fitting = list(self.curr_replicas.values())
        if isinstance(request, GenerationRequest):
            fitting = [r for r in fitting if _fingerprint(r) == request.fingerprint] or fitting
            alike = [r for r in fitting if request.numerics_id and _numerics_id(r) == request.numerics_id]
            fitting = [r for r in alike if not self._directory.silent(r.replica_id.unique_id)] or fitting
        fitting = [r for r in fitting if not self._directory.silent(r.replica_id.unique_id)] or fitting
        names = [r.replica_id.unique_id for r in fitting if r.replica_id.unique_id in load]
        return min(random.sample(names, min(2, len(names))), key=load.__getitem__, default=None)


class _Replica(RunningReplica):
    """Serve's handle of one replica, which also notes each request that is sent to it."""

    def __init__(self, replica_info: Any, table: ReplicaDirectory, places: Places) -> None:
        super().__init__(replica_info)
        self._directory = table
        self._places = places

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        if pr.args:
            self._directory.sent(pr.args[0], self.replica_id.unique_id)
        self._places.sent(pr.metadata.internal_request_id)
        return super().try_send_request(pr, with_rejection)


def _fingerprint(replica: RunningReplica) -> Fingerprint | None:
    fingerprint: Fingerprint | None = replica.replica_metadata.get(FINGERPRINT_KEY)
    return fingerprint


def _numerics_id(replica: RunningReplica) -> str:
    return str(replica.replica_metadata.get(NUMERICS_KEY, ""))
