"""What is noted of suspects goes when their attempts do, and trouble with the store reaches nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from fake_replica import counts, generation_request

from serve_app.deployments import replica_client, suspects
from serve_app.deployments.replica_client import RayReplicaClient
from serve_app.deployments.replica_table import replica_table
from serve_app.deployments.suspects import SuspectNotes
from serve_app.messages import GenerationRequest, Reply, TokenBatch
from serve_app.streams.replica import ReplicaLost

APP, REPLICA = "suspects-app", "replica-1"
SUSPECT = generation_request(alone=True)


class Store:
    """Ray's key-value store, as far as notes use it."""

    def __init__(self) -> None:
        self.notes: dict[str, bytes] = {}
        self.down = False

    def put(self, key: str, value: bytes, namespace: str) -> None:
        self._check()
        self.notes[key] = value

    def get(self, key: str, namespace: str) -> bytes | None:
        self._check()
        return self.notes.get(key)

    def delete(self, key: str, namespace: str) -> None:
        self._check()
        self.notes.pop(key, None)

    def _check(self) -> None:
        if self.down:
            raise RuntimeError("the GCS is away")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(suspects, "_internal_kv_put", made.put)
    monkeypatch.setattr(suspects, "_internal_kv_get", made.get)
    monkeypatch.setattr(suspects, "_internal_kv_del", made.delete)
    return made


def test_a_note_names_one_attempt_and_goes_with_it(store: Store) -> None:
    notes, another = SuspectNotes(APP), replace(SUSPECT, choice=1)
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


def test_a_store_that_is_away_blames_nobody(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    notes = SuspectNotes(APP)
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
        replica_table(APP, "ModelServer").sent(request, REPLICA)
        SuspectNotes(APP).write(REPLICA, request)
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
def client(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayReplicaClient]:
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


async def _gone(store: Store) -> None:
    async with asyncio.timeout(5):
        while store.notes:  # noqa: ASYNC110 - a dictionary tells nobody
            await asyncio.sleep(0.005)


async def test_an_attempt_that_finishes_leaves_no_note(client: Any, store: Store) -> None:
    replies = [reply async for reply in client(finishes).open(SUSPECT)]
    assert len(replies) == 3
    await _gone(store)


async def test_an_attempt_that_is_closed_leaves_no_note(client: Any, store: Store) -> None:
    async with aclosing(client(is_slow).open(SUSPECT)) as replies:
        await anext(replies)
        assert store.notes
    await _gone(store)


async def test_a_death_is_blamed_on_its_suspect_and_leaves_no_note(client: Any, store: Store) -> None:
    with pytest.raises(ReplicaLost) as lost:
        [reply async for reply in client(dies).open(SUSPECT)]
    assert (lost.value.blamed, lost.value.taken) == (True, True)
    await _gone(store)


async def test_a_death_while_the_store_is_away_is_a_loss_like_any_other(client: Any, store: Store) -> None:
    async with aclosing(client(dies).open(SUSPECT)) as replies:
        await anext(replies)
        store.down = True
        with pytest.raises(ReplicaLost) as lost:
            await anext(replies)
    assert (lost.value.blamed, lost.value.taken) == (False, True)
