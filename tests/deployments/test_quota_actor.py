"""Where what callers use is counted, and the actor that counts for several ingresses."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from serve_app.access.memory_quotas import MemoryQuotaStore
from serve_app.access.quotas import Ask, Demand, QuotaUnavailable, Settle
from serve_app.access.shared_quotas import SharedQuotas
from serve_app.config import AppConfig
from serve_app.deployments.quota_actor import NAMESPACE, VERSION, ActorCarrier, QuotaActor, open_quotas
from serve_app.models.model_error import ModelError

KEY = (Demand("key laptop", 3, 100, None, 2),)


class _Actors:
    """In place of Ray: the actors that were started, of which some have died."""

    def __init__(self) -> None:
        self.actors: list[QuotaActor] = []
        self.dead = 0

    def connect(self) -> Any:
        if len(self.actors) <= self.dead:
            self.actors.append(QuotaActor())
        number = len(self.actors) - 1

        async def perform(package: bytes) -> bytes:
            if number < self.dead:
                raise ActorDiedError
            return await self.actors[number].perform(package)

        return SimpleNamespace(perform=SimpleNamespace(remote=perform))


async def test_when_the_actor_dies_the_counts_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    actors, loop = _Actors(), asyncio.get_running_loop()
    monkeypatch.setattr(asyncio, "to_thread", lambda work: asyncio.sleep(0, work()))  # an actor is made in a loop
    carrier = ActorCarrier("app")
    monkeypatch.setattr(carrier, "_connect", actors.connect)
    store = SharedQuotas(carrier.carry, carrier.aclose)
    assert [use.used for use in await store.ask(Ask("a", KEY, 60, stream=True))] == [0, 0, 0]
    assert [use.used for use in await store.ask(Ask("b", KEY, 60, stream=True))] == [1, 60, 1]
    actors.dead = 1
    store.tell(Settle("a", ("key laptop",), 10))
    assert [use.used for use in await store.ask(Ask("c", KEY, 60, stream=True))] == [0, 0, 0]
    assert len(actors.actors) == 2
    actors.dead = 3
    with pytest.raises(QuotaUnavailable, match="ActorDiedError"):
        await store.ask(Ask("d", KEY, 60, stream=True))
    for actor in actors.actors:
        actor._ending.cancel()
    assert loop is asyncio.get_running_loop()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, MemoryQuotaStore),
        ({"ingress": {"num_replicas": 2}}, SharedQuotas),
        ({"ingress": {"autoscaling": {"min_replicas": 1, "max_replicas": 2}}}, SharedQuotas),
        ({"streams": {"store": "redis://host:6379/0"}}, SharedQuotas),
    ],
)
def test_one_ingress_counts_alone_and_several_share(config: dict[str, Any], kind: type) -> None:
    assert type(open_quotas(AppConfig.model_validate(config), "app")) is kind


def test_a_url_that_can_not_be_read_is_refused_without_its_password() -> None:
    config = AppConfig.model_validate({"streams": {"store": "redis://:sesame#x@host:6379/0"}})
    with pytest.raises(ModelError, match=r"streams\.store") as refused:
        open_quotas(config, "app")
    assert "sesame" not in str(refused.value)


@pytest.fixture
def app_name(cluster: object) -> Iterator[str]:
    """Of an application that has an actor of its own, which is taken away."""
    name = secrets.token_hex(4)
    yield name
    with suppress(ValueError):
        ray.kill(ray.get_actor(f"limits of {name}, version {VERSION}", namespace=NAMESPACE))


@pytest.mark.ray
async def test_ingresses_share_the_actor(app_name: str) -> None:
    stores = []
    for _ in range(2):
        carrier = ActorCarrier(app_name)
        stores.append(SharedQuotas(carrier.carry, carrier.aclose))
    # Of a day, and not of a minute, which may end meanwhile.
    key = (Demand("key laptop", None, None, 100, 2),)
    answers = await asyncio.gather(*(stores[n % 2].ask(Ask(f"{n}", key, 10, stream=True)) for n in range(6)))
    assert sum(not any(use.wait_s for use in answer) for answer in answers) == 2
    for n in range(6):
        stores[(n + 1) % 2].tell(Settle(f"{n}", ("key laptop",), 5))
    for store in stores:
        tokens, streams = await store.ask(Ask("last", key, 0))
        assert (tokens.used, tokens.wait_s, streams.used, streams.wait_s) == (10, 0, 0, 0)
