"""Who gets which place, and how often a replica is asked for one that others hold: no Ray needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest
from fake_replica import generation_request
from simulated_time import simulated_time

from serve_app.access.admission import SPARE_WITHIN_S, Admission
from serve_app.access.entry import Entry
from serve_app.access.outlook import START_ANSWER_TOKENS
from serve_app.access.pace import START_S_PER_TOKEN
from serve_app.core import GenerationRequest, Priority, ReplicaLoad
from serve_app.deployments.dispatch.places import FIRST_PAUSE_S, MAX_PAUSE_S, Choose, Places

BEGUN = {"output_token_ids": (1,)}
BATCH = {"priority": Priority.BATCH}


def least_loaded(load: Mapping[str, int]) -> str | None:
    return min(load, key=load.__getitem__)


class Asking:
    """A router's side: requests that ask for places, each in a task of its own."""

    def __init__(self, *, shared: bool = False, places: int | None = None, **limits: int) -> None:
        self.admission = Admission(clock=asyncio.get_running_loop().time)
        self.admission.capacity.configure(places, shared=shared)
        self.places = Places(self.admission)
        self.places.update(limits)
        self.got: list[tuple[str, str | None]] = []
        """In the order in which they were given."""
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, *keys: str, choose: Choose = least_loaded, **request: object) -> None:
        for key in keys:
            asked = generation_request(**request)
            self.tasks[key] = asyncio.create_task(self._take(key, asked, choose))
            await settled()

    async def _take(self, key: str, request: GenerationRequest, choose: Choose) -> None:
        self.got.append((key, await self.places.take(key, request, choose)))

    async def report(self, replica: str, **load: int) -> None:
        self.admission.loaded(replica, loaded(**load))
        await settled()

    def accept(self, key: str, replica: str, ongoing: int) -> None:
        self.places.sent(key)
        self.places.told(replica, ongoing)
        self.places.accepted(key)

    async def complete(self, *keys: str) -> None:
        for key in keys:
            self.places.completed(key)
            await settled()


def loaded(**values: float) -> ReplicaLoad:
    zeros = dict.fromkeys(("running", "waiting", "waiting_tokens", "tokens_per_s", "seconds_per_request"), 0)
    return ReplicaLoad(**{**zeros, "places": 2, "free_tokens": 1000, **values})  # type: ignore[arg-type]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
async def time() -> AsyncIterator[None]:
    with simulated_time():
        yield
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_coro().__qualname__.startswith("Asking."):  # type: ignore[union-attr]
                task.cancel()


async def test_a_free_place_is_given_at_once_to_the_replica_with_fewer_requests() -> None:
    asking = Asking(a=2, b=2)
    await asking.ask("1", "2", "3", "4")
    assert sorted(replica or "" for _, replica in asking.got) == ["a", "a", "b", "b"]


async def test_who_waits_comes_in_order_and_what_has_begun_comes_first() -> None:
    asking = Asking(a=1)
    await asking.ask("first")
    await asking.ask("new", "newer")
    await asking.ask("begun", **BEGUN)
    for done in ("first", "begun", "new"):
        await asking.complete(done)
    assert [key for key, _ in asking.got] == ["first", "begun", "new", "newer"]


async def test_waiting_asks_nobody() -> None:
    """A minute in which nothing is given back, and nobody is sent to try."""
    asking = Asking(a=1)
    await asking.ask("1", "2", "3")
    asking.accept("1", "a", 1)
    await asyncio.sleep(60)
    assert [key for key, _ in asking.got] == ["1"]


async def test_one_that_is_given_up_gives_its_place_to_the_next() -> None:
    asking = Asking(a=1)
    await asking.ask("1", "2", "3", "4")
    asking.tasks["2"].cancel()  # it waited
    asking.places.unsent("1")  # it had a place and was not sent
    await settled()
    assert [key for key, _ in asking.got] == ["1", "3"]
    asking.places.sent("3")
    asking.places.unsent("3")  # it was sent: its replica has it until it says otherwise
    await settled()
    assert [key for key, _ in asking.got] == ["1", "3"]
    await asking.complete("3", "3", "unknown")
    assert [key for key, _ in asking.got] == ["1", "3", "4"]


async def test_one_that_is_cancelled_in_the_moment_of_its_place_loses_none() -> None:
    asking = Asking(a=1)
    await asking.ask("1", "2", "3")
    asking.places.completed("1")  # "2" has the place, and does not know it yet
    asking.tasks["2"].cancel()
    await settled()
    assert asking.got == [("1", "a"), ("3", "a")]


async def test_calls_that_share_a_key_lose_no_place() -> None:
    asking = Asking(a=2)
    for _ in range(5):
        await asking.ask("same")
        asking.accept("same", "a", 1)
        await asking.ask("same")
        asking.accept("same", "a", 2)
        await asking.complete("same", "same")
    await asking.ask("1", "2")
    await asyncio.sleep(2 * FIRST_PAUSE_S)  # one of two counts for one of others, who might give it back
    assert [key for key, _ in asking.got[10:]] == ["1", "2"]


async def test_each_request_gets_what_it_chooses_and_holds_up_none_of_other_weights() -> None:
    asking = Asking(a=1, b=1)
    await asking.ask("1", choose=lambda load: "a" if "a" in load else None)
    await asking.ask("2", choose=lambda load: "a" if "a" in load else None, fingerprint="other")
    await asking.ask("3")
    assert asking.got == [("1", "a"), ("3", "b")]
    await asking.complete("1")
    assert asking.got[2:] == [("2", "a")]


@pytest.mark.parametrize("completed_first", [True, False])
async def test_a_replica_that_others_fill_is_tried_less_and_less_often(completed_first: bool) -> None:
    """Once a second in the end, however many wait."""
    asking = Asking(a=4)
    tried_s: list[float] = []

    async def refused_again_and_again(key: str) -> None:
        request = generation_request()
        while True:
            assert await asking.places.take(key, request, least_loaded) == "a"
            tried_s.append(asyncio.get_running_loop().time())
            asking.places.sent(key)
            asking.places.told("a", 4)
            if completed_first:
                asking.places.completed(key)

    tasks = [asyncio.create_task(refused_again_and_again(str(number))) for number in range(20)]
    await settled()
    assert len(tried_s) == 1, "the others go by what it was told"
    await asyncio.sleep(20)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    assert 20 / (1.5 * MAX_PAUSE_S) <= len(tried_s) <= 6 + 20 / (0.5 * MAX_PAUSE_S)
    assert tried_s[1] - tried_s[0] <= 1.5 * FIRST_PAUSE_S


async def test_what_others_give_back_is_found_and_used() -> None:
    asking = Asking(a=3)
    await asking.ask("1")
    asking.accept("1", "a", 3)  # two are of others
    await asking.ask("2", "3", "4")
    assert [key for key, _ in asking.got] == ["1"]
    await asyncio.sleep(1.5 * FIRST_PAUSE_S)
    assert [key for key, _ in asking.got] == ["1", "2"], "one tries"
    asking.accept("2", "a", 2)  # and hears that the others have gone
    await asking.complete("1")
    assert [key for key, _ in asking.got] == ["1", "2", "3", "4"]


async def test_one_of_several_routers_leaves_the_last_place_to_those_that_have_none() -> None:
    asking, other = Asking(shared=True, a=3), Asking(shared=True, a=3)
    await asking.ask("1", "2", "3")
    assert [key for key, _ in asking.got] == ["1", "2"]
    await other.ask("x")
    assert other.got == [("x", "a")]


async def test_one_router_alone_takes_the_only_place_of_a_shared_replica() -> None:
    asking = Asking(shared=True, a=1)
    await asking.ask("1")
    assert asking.got == [("1", "a")]


async def test_those_that_wait_learn_of_new_replicas_and_that_there_are_none_left() -> None:
    asking = Asking(a=1)
    await asking.ask("1", "2", "3")
    asking.places.update({"a": 1, "b": 1})
    await settled()
    assert asking.got[1:] == [("2", "b")]
    asking.places.update({})
    await settled()
    assert asking.got[2:] == [("3", None)]
    await asking.complete("1", "2")
    await asking.ask("4")
    assert asking.got[3:] == [("4", None)]
    await asking.complete("2")
    asking.places.update({})
    assert asking.places._places == asking.places._waiters == {}
    assert asking.admission._entries == asking.admission._groups == asking.admission._placed == {}
    assert asking.admission.capacity._replicas == asking.admission.capacity._at == {}


async def test_a_replica_gets_what_it_can_start_and_a_little_more() -> None:
    """Not all that Serve would let it have: what more there is waits here, in order."""
    asking = Asking(a=256, places=32)
    await asking.ask(*map(str, range(40)))
    assert len(asking.got) == 33, "one spare one"
    await asking.report("a", places=4, running=0)
    await asking.complete("0")
    assert len(asking.got) == 33, "it has only 4 places, and more than that already"


async def test_of_many_that_end_at_once_no_spare_request_is_left_to_wait_for_the_next() -> None:
    """It would wait in its replica for as long as a whole request takes, where nobody can refuse it."""
    asking = Asking(a=256, places=4)
    requests = [generation_request(max_new_tokens=START_ANSWER_TOKENS) for _ in range(12)]
    for number, request in enumerate(requests):
        asking.admission.enter(request)
        asking.tasks[str(number)] = asyncio.create_task(asking._take(str(number), request, least_loaded))
        await settled()
    assert len(asking.got) == 4
    await asyncio.sleep(START_ANSWER_TOKENS * START_S_PER_TOKEN - SPARE_WITHIN_S / 2)
    asking.places._hand_out()
    await settled()
    assert len(asking.got) == 5, "a place falls free soon"
    await asking.complete("0", "1", "2", "3")
    assert len(asking.got) == 8
    await asyncio.sleep(1)
    await asking.complete("4", "5")
    assert len(asking.got) == 10


async def test_reports_tell_what_other_ingresses_use_and_nobody_asks_in_vain() -> None:
    asking = Asking(shared=True, a=256)
    await asking.report("a", running=2, waiting=2)
    await asking.ask("1", "2")
    await asyncio.sleep(60)
    assert asking.got == []
    await asking.report("a", running=1)
    assert [key for key, _ in asking.got] == ["1", "2"], "of its two places one is free, and there is a spare one"


async def test_a_prompt_that_memory_has_no_room_for_keeps_its_turn() -> None:
    asking = Asking(a=256)
    await asking.report("a", places=8, running=1, free_tokens=300, waiting_tokens=90)
    await asking.ask("fits", prompt_token_ids=(1,) * 200)
    await asking.ask("long", prompt_token_ids=(1,) * 100)
    await asking.ask("short")
    assert [key for key, _ in asking.got] == ["fits"], "or a stream of short prompts would keep the long one waiting"
    assert asking.admission.blocked
    await asking.report("a", places=8, running=2, free_tokens=400)
    assert [key for key, _ in asking.got] == ["fits", "long", "short"]


async def test_what_fits_nowhere_is_sent_to_an_idle_replica_which_refuses_it() -> None:
    asking = Asking(a=256)
    await asking.report("a", free_tokens=10)
    await asking.ask("huge", prompt_token_ids=(1,) * 100)
    assert asking.got == [("huge", "a")]


async def test_interactive_requests_are_sent_where_batch_ones_have_all_places() -> None:
    asking = Asking(a=256)
    await asking.report("a")
    await asking.ask("b1", "b2", "b3", "b4", **BATCH)
    await asking.ask("1", "2", "3", "4")
    assert [key for key, _ in asking.got] == ["b1", "b2", "b3", "1", "2", "3"]
    await asking.complete("b1", "b2", "b3")
    assert [key for key, _ in asking.got][6:] == []
    await asking.complete("1")
    assert [key for key, _ in asking.got][6:] == ["4"]
    await asking.complete("2")
    assert [key for key, _ in asking.got][7:] == ["b4"]


async def test_tenants_take_turns() -> None:
    asking = Asking(a=1)
    await asking.ask("1")
    await asking.ask("many 1", "many 2", "many 3", tenant="many")
    await asking.ask("few", tenant="few")
    for done in ("1", "many 1", "few", "many 2"):
        await asking.complete(done)
    assert [key for key, _ in asking.got] == ["1", "many 1", "few", "many 2", "many 3"]


async def test_one_whose_replica_died_on_the_way_gets_another_place() -> None:
    """Serve tells that its call has ended, and asks again for the same request, in this order or the other."""
    asking = Asking(a=1)
    request = generation_request()
    entry = asking.admission.enter(request)
    assert isinstance(entry, Entry)
    assert await asking.places.take("1", request, least_loaded) == "a"
    asking.places.sent("1")
    asking.places.completed("1")
    asking.places.update({"b": 1})
    async with asyncio.timeout(60):
        assert await asking.places.take("1", request, least_loaded) == "b"
    asking.places.sent("1")
    asking.places.completed("1")
    asking.admission.leave(entry)
    assert not asking.admission.turns
    assert asking.admission.capacity.rooms(entry) == {"b": 0}
