"""The engine by the clock has all that a model server asks of an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loadtest.paced_app import CARD, PacedEngine, PacedModelServer
from serve_app.core import FinishReason, GenerationRequest, ReplicaLoad, SamplingParams, TokenBatch
from serve_app.deployments.dispatch.channel_writer import TokenChannels
from serve_app.deployments.dispatch.liveness import IngressLiveness
from serve_app.engine.engine import Engine


@pytest.fixture
def server() -> Iterator[PacedModelServer]:
    """A replica without Ray around it."""
    made = object.__new__(PacedModelServer)
    made._ingresses, made._channels = IngressLiveness(), TokenChannels()
    made._engine = PacedEngine(500)  # type: ignore[assignment]
    made._fingerprint = CARD.fingerprint
    yield made
    made._engine.stop()


async def test_a_model_server_runs_on_it(server: PacedModelServer) -> None:
    assert server.record_replica_metadata()["fingerprint"] == CARD.fingerprint
    await server.check_health()
    loads: list[ReplicaLoad] = []
    server._engine.watch_load(loads.append)
    request = GenerationRequest("r", CARD.fingerprint, (1,), SamplingParams(seed=3), max_new_tokens=5)
    replies = [reply async for reply in server.generate(request)]
    tokens = [token for reply in replies if isinstance(reply, TokenBatch) for token in reply.token_ids]
    assert len(tokens) == 5
    assert isinstance(replies[-1], TokenBatch)
    assert replies[-1].finish_reason is FinishReason.LENGTH
    assert (await server.stats()).running == 0
    assert max(load.running for load in loads) == 1


def test_it_has_all_public_methods_of_the_engine() -> None:
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public <= set(vars(PacedEngine))
