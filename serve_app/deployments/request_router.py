"""Chooses the model replica for each request, and tells the ingress where its requests are and which replicas live.

Promises that a request goes to a replica of its own weights that is neither leaving nor silent, if there is one. Serve
pickles this module by value, so it can hold no state: that is in `replica_table`. Knows no stream.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.deployments.calls import cancel
from serve_app.deployments.replica_table import ReplicaTable, replica_table
from serve_app.messages import Fingerprint, GenerationRequest

FINGERPRINT_KEY = "fingerprint"
"""In what a replica says of itself to the routers (`record_replica_metadata`)."""
ARITHMETIC_KEY = "arithmetic"
"""Likewise: how it computes, where that is exact."""
CHANNEL_KEY = "channel"
"""Likewise: where its token channels are had (`channel_wire.ChannelAddress`)."""


class ModelRouter(RequestRouter):
    """The power of two choices, among the replicas that can serve the request."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve once, before it names any replica."""
        self._table = replica_table(self.app_name, self._deployment_id.name)

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """Called by Serve for each new replica."""
        return _Replica(replica_info, self._table)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with the replicas that take requests, whenever they change."""
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a request or a probe met a dead one, which is before its controller knows."""
        super().on_replica_actor_died(replica_id)
        self._table.died(replica_id.unique_id)
        self._publish()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when the replica has accepted it: from here on it is not sent anywhere else."""
        args = pending_request.args
        if args and not self._table.taken(args[0], replica_id.unique_id, result):
            cancel(result)

    def _publish(self) -> None:
        replicas = {replica.replica_id.unique_id: replica for replica in self.curr_replicas.values()}
        self._table.update(
            {name: _fingerprint(replica) for name, replica in replicas.items()},
            {name: _arithmetic(replica) for name, replica in replicas.items()},
            {name: str(replica.replica_metadata.get(CHANNEL_KEY, "")) for name, replica in replicas.items()},
        )

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Two at random of those that fit; Serve takes the one with fewer requests, and asks again when both are full.

        When none has the request's weights any one may say so: a request must not wait for what may never come. What
        another replica began goes to one that computes alike, if there is one.
        """
        fitting = candidate_replicas
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
            request = pending_request.args[0] if pending_request.args else None
            if isinstance(request, GenerationRequest):
                self._table.waiting(request)
                fitting = [r for r in fitting if _fingerprint(r) == request.fingerprint] or fitting
                alike = [r for r in fitting if request.arithmetic and _arithmetic(r) == request.arithmetic]
                fitting = [r for r in alike if not self._table.silent(r.replica_id.unique_id)] or fitting
        fitting = [r for r in fitting if not self._table.silent(r.replica_id.unique_id)] or fitting
        return [random.sample(fitting, min(2, len(fitting)))]


class _Replica(RunningReplica):
    """Serve's own, and says which request it was given."""

    def __init__(self, replica_info: Any, table: ReplicaTable) -> None:
        super().__init__(replica_info)
        self._table = table

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        if pr.args:
            self._table.sent(pr.args[0], self.replica_id.unique_id)
        return super().try_send_request(pr, with_rejection)


def _fingerprint(replica: RunningReplica) -> Fingerprint | None:
    fingerprint: Fingerprint | None = replica.replica_metadata.get(FINGERPRINT_KEY)
    return fingerprint


def _arithmetic(replica: RunningReplica) -> str:
    return str(replica.replica_metadata.get(ARITHMETIC_KEY, ""))
