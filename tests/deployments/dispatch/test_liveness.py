from __future__ import annotations

import asyncio
import time

import pytest
import ray

from serve_app.deployments.dispatch import liveness
from serve_app.deployments.dispatch.liveness import IngressLiveness, own_name

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@ray.remote(num_cpus=0)
class Caller:
    """Somebody with a name."""

    def name(self) -> str:
        return own_name()


async def test_a_caller_that_died_is_noticed_and_others_are_not() -> None:
    dying, living = (Caller.options(name=name, namespace="serve").remote() for name in ("dying", "living"))
    ingresses = IngressLiveness()
    names = [await dying.name.remote(), await living.name.remote()]
    assert names == ["dying", "living"]
    with (
        ingresses.waiting("dying"),
        ingresses.waiting("dying"),
        ingresses.waiting("living"),
        ingresses.waiting("unknown"),
    ):
        async with asyncio.timeout(20):
            while ingresses._found != {"dying", "living"}:  # noqa: ASYNC110 - a look at each, which a kill must follow
                await asyncio.sleep(0.01)
        assert not ingresses.gone("dying")
        ray.kill(dying)
        killed = time.monotonic()
        while not ingresses.gone("dying"):
            assert time.monotonic() - killed < 30
            await asyncio.sleep(0.01)
        assert not ingresses.gone("living")
        assert not ingresses.gone("unknown")
    assert not ingresses.gone("dying")  # nobody of that name waits: nothing is remembered
    ray.kill(living)


async def test_a_replica_that_died_before_the_first_look_is_noticed() -> None:
    """An ingress may be killed within the half second after it asked for the first time."""
    ingresses, name = IngressLiveness(), "SERVE_REPLICA::app#Ingress#killed-at-once"
    with ingresses.waiting(name):
        async with asyncio.timeout(20):
            while not ingresses.gone(name):  # noqa: ASYNC110 - a thread looks
                await asyncio.sleep(0.01)
        assert ingresses._gone == {name}
    assert not ingresses.gone(name)


async def test_a_look_that_fails_says_nothing_and_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def get_actor(name: str, namespace: str) -> None:
        looks.append(name)
        raise TimeoutError if len(looks) < 3 else ValueError

    monkeypatch.setattr(liveness.ray, "get_actor", get_actor)
    ingresses, name = IngressLiveness(), "SERVE_REPLICA::app#Ingress#cut-off"
    with ingresses.waiting(name):
        async with asyncio.timeout(30):
            while not ingresses.gone(name):  # noqa: ASYNC110 - a thread looks
                await asyncio.sleep(0.01)
    assert len(looks) == 3


def test_a_script_has_no_name_and_is_not_watched() -> None:
    assert own_name() == ""
