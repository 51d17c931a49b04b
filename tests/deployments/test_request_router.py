"""Which replicas a request may go to, as a function of what they say of themselves: no Ray needed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model_server import CARD, request

from serve_app.deployments.replica_table import ReplicaTable
from serve_app.deployments.request_router import ARITHMETIC_KEY, FINGERPRINT_KEY, ModelRouter

OURS = CARD.fingerprint


def replica(name: str, fingerprint: str = OURS, arithmetic: str = "") -> Any:
    metadata = {FINGERPRINT_KEY: fingerprint, ARITHMETIC_KEY: arithmetic}
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), replica_metadata=metadata)


async def chosen(asked: Any, *replicas: Any, silent: str = "") -> set[str]:
    """All that may be chosen, over many draws."""
    router = ModelRouter.__new__(ModelRouter)
    router._table = table = ReplicaTable()
    if silent:
        assert table.fell_silent(silent, 4)
    pending: Any = SimpleNamespace(args=[asked], routing_context=SimpleNamespace(should_backoff=False))
    names: set[str] = set()
    for _ in range(50):
        (ranked,) = await router.choose_replicas(list(replicas), pending)
        names |= {each.replica_id.unique_id for each in ranked}
    return names


A, B, OTHER = replica("a", arithmetic="x"), replica("b", arithmetic="y"), replica("c", "other", "x")


@pytest.mark.parametrize(
    ("arithmetic", "replicas", "expected"),
    [
        ("", (A, B, OTHER), {"a", "b"}),
        ("x", (A, B, OTHER), {"a"}),
        ("x", (B, OTHER), {"b"}),
        ("x", (OTHER,), {"c"}),
    ],
)
async def test_weights_come_first_and_then_how_it_computes(
    arithmetic: str, replicas: tuple[Any, ...], expected: set[str]
) -> None:
    assert await chosen(replace(request(), arithmetic=arithmetic), *replicas) == expected


async def test_going_on_matters_more_than_the_last_bit() -> None:
    assert await chosen(replace(request(), arithmetic="x"), A, B, silent="a") == {"b"}
