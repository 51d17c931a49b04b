"""What is noted of suspects goes when their attempts do, and trouble with the store reaches nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from fake_key_value_store import FakeKeyValueStore
from fake_replica import counts, generation_request
from msgspec.structs import replace

from serve_app.core import GenerationRequest, Reply, TokenBatch
from serve_app.deployments.dispatch import poison, replica_client
from serve_app.deployments.dispatch.directory import replica_directory
from serve_app.deployments.dispatch.poison import PoisonNotes
from serve_app.deployments.dispatch.replica_client import RayReplicaClient
from serve_app.generation.replica import ReplicaLost

APP, REPLICA = "suspects-app", "replica-1"
SUSPECT = generation_request(isolated=True)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeKeyValueStore:
    return FakeKeyValueStore().used_by(poison, monkeypatch)


def test_a_note_names_one_attempt_and_goes_with_it(store: FakeKeyValueStore) -> None:
    notes, another = PoisonNotes(APP), replace(SUSPECT, choice=1)
    notes.write(REPLICA, SUSPECT)
    assert notes.names(REPLICA, SUSPECT)
    assert not notes.names(REPLICA, another)
    assert not notes.names(REPLICA, replace(SUSPECT, output_token_ids=(5,)))
    assert not notes.names("replica-2", SUSPECT)
    notes.write(REPLICA, another)
    notes.forget(REPLICA, SUSPECT)  # it is another's by now
    assert notes.names(REPLICA, another)
    notes.forget(REPLICA, another)
    assert store.notes == {}


def test_a_store_that_is_away_blames_nobody(store: FakeKeyValueStore, caplog: pytest.LogCaptureFixture) -> None:
    notes = PoisonNotes(APP)
    notes.write(REPLICA, SUSPECT)
    store.down = True
    notes.write(REPLICA, SUSPECT)
    assert not notes.names(REPLICA, SUSPECT)
    notes.forget(REPLICA, SUSPECT)
    assert "r1" in caplog.text


class ModelServer:
    """A deployment handle whose one replica computes suspects alone, and then does `then`."""

    app_name, deployment_name = APP, "ModelServer"

    def __init__(self, then: Callable[[GenerationRequest], AsyncGenerator[Reply, None]]) -> None:
        self._then = then

    def options(self, **options: Any) -> ModelServer:
        return self

    def remote(self, request: GenerationRequest) -> Any:
        replica_directory(APP, "ModelServer").sent(request, REPLICA)
        PoisonNotes(APP).write(REPLICA, request)
        return Response(self._then(request))


class Response:
    def __init__(self, replies: AsyncGenerator[Reply, None]) -> None:
        self._replies = replies

    def __aiter__(self) -> AsyncGenerator[Reply, None]:
        return self._replies

    def cancel(self) -> None:
        """Nothing runs elsewhere."""


class Doubtless:
    """Of `Readiness` what losses need."""

    def doubt(self) -> None:
        """Nothing."""


@pytest.fixture
def client(store: FakeKeyValueStore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayReplicaClient]:
    monkeypatch.setattr(replica_client, "own_name", lambda: "")
    return lambda then: RayReplicaClient(ModelServer(then), Doubtless())  # type: ignore[arg-type]


async def finishes(request: GenerationRequest) -> AsyncGenerator[Reply, None]:
    for step in counts(3)(request):
        assert isinstance(step, TokenBatch)
        yield step


async def dies(request: GenerationRequest) -> AsyncGenerator[Reply, None]:
    yield TokenBatch(0)
    raise ConnectionResetError


async def is_slow(request: GenerationRequest) -> AsyncGenerator[Reply, None]:
    yield TokenBatch(0)
    await asyncio.get_running_loop().create_future()


async def _gone(store: FakeKeyValueStore) -> None:
    async with asyncio.timeout(5):
        while store.notes:  # noqa: ASYNC110 - a dictionary tells nobody
            await asyncio.sleep(0.005)


async def test_an_attempt_that_finishes_leaves_no_note(client: Any, store: FakeKeyValueStore) -> None:
    replies = [reply async for reply in client(finishes).open(SUSPECT)]
    assert len(replies) == 3
    await _gone(store)


async def test_an_attempt_that_is_closed_leaves_no_note(client: Any, store: FakeKeyValueStore) -> None:
    async with aclosing(client(is_slow).open(SUSPECT)) as replies:
        await anext(replies)
        assert store.notes
    await _gone(store)


async def test_a_death_is_blamed_on_its_suspect_and_leaves_no_note(client: Any, store: FakeKeyValueStore) -> None:
    with pytest.raises(ReplicaLost) as lost:
        [reply async for reply in client(dies).open(SUSPECT)]
    assert (lost.value.implicated, lost.value.taken) == (True, True)
    await _gone(store)


async def test_a_death_while_the_store_is_away_is_a_loss_like_any_other(client: Any, store: FakeKeyValueStore) -> None:
    async with aclosing(client(dies).open(SUSPECT)) as replies:
        await anext(replies)
        store.down = True
        with pytest.raises(ReplicaLost) as lost:
            await anext(replies)
    assert (lost.value.implicated, lost.value.taken) == (False, True)
