"""The seam between a generation and whatever runs the model: ids in, ids out.

Implemented over Ray by `deployments.dispatch.replica_client`, and by fakes in tests. Knows no transport and no text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from serve_app.core import GenerationRequest, LoadStage, ModelCard, Reply


class ReplicaLost(Exception):
    """The attempt ended without a last reply: the replica died, was taken away, or fell silent.

    What it delivered stays valid; the same request with those ids as `output_token_ids` continues it elsewhere.
    """

    def __init__(self, reason: str, *, taken: bool = True, implicated: bool = False) -> None:
        """`taken`: a replica had accepted the attempt. `implicated`: it was computing the attempt in isolation."""
        super().__init__(reason)
        self.taken = taken
        self.implicated = implicated


@dataclass(frozen=True, slots=True)
class Waiting:
    """The attempt waits for its turn, and may still be refused: its caller is told nothing yet."""


WAITING = Waiting()


class ReplicaClient(Protocol):
    """Opens attempts on a replica. The client chooses the replica and the connection."""

    def open(self, request: GenerationRequest) -> AsyncGenerator[Reply | Waiting, None]:
        """Start one attempt and yield its replies as they come, an empty batch or `WAITING` at least each second.

        It ends after a batch with a `finish_reason` or after a `Failure`. Closing the generator cancels the work
        on the replica. Raises `ReplicaLost` when the attempt can be repeated on another replica.
        """
        ...

    async def model(self) -> ModelCard | LoadStage:
        """The card of a replica that can serve now, or how far the first one is with loading."""
        ...
