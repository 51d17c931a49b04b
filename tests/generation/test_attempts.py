from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise

import pytest
from fake_replica import (
    ALIVE,
    FakeReplica,
    Script,
    counts,
    fails,
    generation_request,
    prompt_scores,
    says,
    tokens,
)

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationRequest,
    LoadStage,
    ModelCard,
    Reply,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.attempts import Generation, interleave
from serve_app.generation.replica import ReplicaClient, ReplicaLost

pytestmark = pytest.mark.usefixtures("exact_time")  # else a stall would look like a silent replica

QUICK = FailoverSettings(silence_s=0.05, max_attempts=3, first_backoff_s=0.001, max_backoff_s=0.002)


async def replies(client: ReplicaClient, settings: FailoverSettings = QUICK, **changes: object) -> list[Reply]:
    changed = asyncio.Event()
    async with Generation(client, generation_request(**changes), changed, settings) as generation:
        return [reply async for _, reply in interleave({0: generation}, changed)]


def ids(answer: list[Reply]) -> list[int]:
    """The ids of all batches, checked to be consecutive."""
    output: list[int] = []
    for reply in answer:
        if isinstance(reply, TokenBatch):
            assert reply.first_index == len(output)
            output.extend(reply.token_ids)
    return output


TEN = list(range(100, 110))


async def test_one_attempt_from_start_to_finish() -> None:
    replica = FakeReplica([counts()])
    answer = await replies(replica)
    assert ids(answer) == TEN
    last = answer[-1]
    assert isinstance(last, TokenBatch)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.stats is not None
    assert last.stats.cached_prompt_tokens == 2
    assert (len(replica.requests), replica.closed) == (1, 1)


async def test_each_token_is_handed_out_as_it_comes() -> None:
    answer = await replies(FakeReplica([counts(pause_s=0.001)]))
    assert [len(reply.token_ids) for reply in answer if isinstance(reply, TokenBatch)] == [1] * 10


@pytest.mark.parametrize(
    "end",
    [
        ReplicaLost("it died"),
        asyncio.CancelledError(),
        None,
        Failure(FailureCode.REPLICA_LOST, "gone"),
        tokens(12, 1),
    ],
    ids=["dies", "foreign CancelledError", "falls silent", "says it is lost", "leaves a gap"],
)
@pytest.mark.parametrize("delivered", [1, 4, 9])
async def test_a_lost_attempt_is_continued(end: Reply | BaseException | None, delivered: int) -> None:
    dying = says(*(tokens(i, 100 + i) for i in range(delivered)), end)
    replica = FakeReplica([dying, counts()])
    assert ids(await replies(replica, remaining_s=60.0)) == TEN
    first, second = replica.requests
    assert first.output_token_ids == ()
    assert second.output_token_ids == tuple(range(100, 100 + delivered))
    assert second.sampling == first.sampling
    assert second.max_new_tokens == first.max_new_tokens
    assert second.remaining_s is not None
    assert first.remaining_s is not None
    assert second.remaining_s < first.remaining_s
    assert replica.closed == 2


async def test_an_attempt_that_ends_without_a_last_word_is_continued() -> None:
    replica = FakeReplica([says(tokens(0, 100)), counts()])
    assert ids(await replies(replica)) == TEN


async def test_overlaps_and_duplicates_are_dropped() -> None:
    again = says(tokens(0, 100, 101, 102), tokens(2, 102, 103), tokens(3, 103, finish=FinishReason.STOP))
    replica = FakeReplica([says(tokens(0, 100, 101), ReplicaLost("died")), again])
    assert ids(await replies(replica)) == [100, 101, 102, 103]


async def test_logprobs_ride_along_over_a_failover() -> None:
    lps = [TokenLogprobs(-float(i), ((i, -float(i)),)) for i in range(3)]

    def script(request: GenerationRequest) -> list[Reply | BaseException]:
        if not request.output_token_ids:
            return [TokenBatch(0, (100, 101), tuple(lps[:2])), ReplicaLost("died")]
        return [TokenBatch(2, (102,), (lps[2],), FinishReason.STOP)]

    answer = await replies(FakeReplica([script]), sampling=SamplingParams(seed=1, logprobs=1))
    assert [lp for reply in answer if isinstance(reply, TokenBatch) for lp in reply.logprobs or ()] == lps


@pytest.mark.parametrize(
    "code", [code for code in FailureCode if code not in (FailureCode.REPLICA_LOST, FailureCode.WRONG_WEIGHTS)]
)
async def test_a_failure_ends_a_new_request_at_once(code: FailureCode) -> None:
    failure = Failure(code, "no", retry_after_s=3)
    replica = FakeReplica([fails(failure), counts()])
    assert await replies(replica) == [failure]
    assert len(replica.requests) == 1


@pytest.mark.parametrize("code", [FailureCode.ENGINE_FAILED, FailureCode.INVALID_REQUEST])
async def test_a_failure_for_good_ends_an_accepted_stream_after_its_tokens(code: FailureCode) -> None:
    replica = FakeReplica([says(tokens(0, 100, 101), ReplicaLost("died")), fails(Failure(code, "no"))])
    answer = await replies(replica)
    assert ids(answer) == [100, 101]
    assert answer[-1] == Failure(code, "no")
    assert len(replica.requests) == 2


@pytest.mark.parametrize("code", [FailureCode.OVERLOADED, FailureCode.NOT_READY])
async def test_an_accepted_stream_waits_for_a_place(code: FailureCode) -> None:
    refusal = fails(Failure(code, "not now"))
    dying = says(tokens(0, 100), ReplicaLost("died"))
    replica = FakeReplica([dying, *[refusal] * (QUICK.max_attempts + 2), counts()])
    assert ids(await replies(replica)) == TEN


async def test_an_accepted_stream_waits_while_no_replica_answers() -> None:
    dying = says(tokens(0, 100), ReplicaLost("died"))
    unreachable = says(ReplicaLost("nobody there", taken=False))
    replica = FakeReplica([dying, *[unreachable] * (QUICK.max_attempts + 2), counts()])
    assert ids(await replies(replica)) == TEN


async def test_a_new_request_does_not_wait_for_ever_for_a_replica() -> None:
    replica = FakeReplica([says(ReplicaLost("nobody there", taken=False))])
    (failure,) = await replies(replica)
    assert isinstance(failure, Failure)
    assert failure.code is FailureCode.REPLICA_LOST
    assert "nobody there" not in failure.message
    assert len(replica.requests) == QUICK.max_attempts


async def test_a_stream_survives_any_number_of_losses_that_are_not_its_doing() -> None:
    def script(request: GenerationRequest) -> list[Reply | BaseException]:
        index = len(request.output_token_ids)
        return [tokens(index, 100 + index), ReplicaLost("killed")]

    replica = FakeReplica([script])
    assert ids(await replies(replica)) == TEN
    assert len(replica.requests) == 10 > QUICK.max_attempts
    assert not any(request.isolated for request in replica.requests)


PATIENT = FailoverSettings(max_attempts=20, first_backoff_s=0.001, max_backoff_s=0.002)


async def test_a_request_that_kills_its_replicas_is_tried_alone_and_refused() -> None:
    def script(request: GenerationRequest) -> list[Reply | BaseException]:
        if not request.output_token_ids:
            return [tokens(0, 100), ReplicaLost("killed")]
        return [ReplicaLost("killed", implicated=request.isolated)]

    replica = FakeReplica([script])
    answer = await replies(replica, PATIENT)
    assert ids(answer) == [100]
    assert isinstance(answer[-1], Failure)
    assert answer[-1].code is FailureCode.POISON
    assert [request.isolated for request in replica.requests] == [False, False, False, True, True]


async def test_a_suspect_that_was_not_computed_when_its_replicas_died_is_innocent() -> None:
    beside_poison = says(ReplicaLost("killed", implicated=False))
    replica = FakeReplica([*[beside_poison] * 8, counts()])
    assert ids(await replies(replica, PATIENT)) == TEN
    assert [request.isolated for request in replica.requests] == [False] * 2 + [True] * 7


async def test_a_new_token_clears_a_suspect() -> None:
    unlucky = says(ReplicaLost("killed"))
    alone_and_blamed = says(ReplicaLost("killed", implicated=True))
    one_token = says(tokens(0, 100), ReplicaLost("killed"))
    replica = FakeReplica([unlucky, unlucky, alone_and_blamed, one_token, unlucky, unlucky, alone_and_blamed, counts()])
    assert ids(await replies(replica, PATIENT)) == TEN
    assert [request.isolated for request in replica.requests] == [False, False, True, True, False, False, True, True]


async def test_it_is_given_up_after_too_many_losses_in_a_row() -> None:
    replica = FakeReplica([says(tokens(0, 100), ReplicaLost("killed")), says(ReplicaLost("killed"))])
    answer = await replies(replica)
    assert ids(answer) == [100]
    assert isinstance(answer[-1], Failure)
    assert answer[-1].code is FailureCode.REPLICA_LOST
    assert len(replica.requests) == 1 + QUICK.max_attempts


OTHER_WEIGHTS = fails(Failure(FailureCode.WRONG_WEIGHTS, "other weights"))


async def test_a_replica_of_other_weights_is_passed_over() -> None:
    replica = FakeReplica([says(tokens(0, 100), ReplicaLost("killed")), OTHER_WEIGHTS, OTHER_WEIGHTS, counts()])
    assert ids(await replies(replica)) == TEN


@pytest.mark.parametrize("delivered", [0, 2])
async def test_a_stream_is_never_continued_by_other_weights(delivered: int) -> None:
    scripts = [says(*(tokens(i, 100 + i) for i in range(delivered)), ReplicaLost("killed")), OTHER_WEIGHTS]
    replica = FakeReplica(scripts)
    answer = await replies(replica)
    assert ids(answer) == TEN[:delivered]
    assert isinstance(answer[-1], Failure)
    assert answer[-1].code is FailureCode.WRONG_WEIGHTS
    assert len(replica.requests) == 1 + QUICK.max_mismatches


@pytest.mark.parametrize("script", [says(None), says(ALIVE, *[0.01, ALIVE] * 200)], ids=["silent", "alive"])
async def test_the_deadline_ends_it(script: Script) -> None:
    replica = FakeReplica([script])
    settings = FailoverSettings(silence_s=5)
    answer = await replies(replica, settings, remaining_s=0.05)
    assert isinstance(answer[-1], Failure)
    assert answer[-1].code is FailureCode.DEADLINE_EXCEEDED
    assert replica.cancelled == 1


async def test_the_deadline_holds_over_attempts() -> None:
    replica = FakeReplica([says(tokens(0, 100), ReplicaLost("died")), fails(Failure(FailureCode.NOT_READY, "loading"))])
    answer = await replies(replica, remaining_s=0.05)
    assert ids(answer) == [100]
    assert isinstance(answer[-1], Failure)
    assert answer[-1].code is FailureCode.DEADLINE_EXCEEDED


async def test_signs_of_life_keep_a_slow_attempt() -> None:
    alive = [0.02, ALIVE] * 5
    replica = FakeReplica([says(*alive, tokens(0, 100, finish=FinishReason.STOP))])
    answer = await replies(replica)
    assert ids(answer) == [100]
    assert len(replica.requests) == 1


async def test_acceptance_is_announced_once_with_an_empty_batch() -> None:
    replica = FakeReplica([says(ALIVE, 0.01, ALIVE, 0.01, tokens(0, 100, finish=FinishReason.STOP))])
    answer = await replies(replica)
    assert answer[0] == TokenBatch(0)
    assert [reply.token_ids for reply in answer if isinstance(reply, TokenBatch)] == [(), (100,)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"max_new_tokens": 2}, FinishReason.LENGTH), ({"stop_token_ids": (101,)}, FinishReason.STOP)],
)
async def test_a_lost_last_word_needs_no_second_attempt(changes: dict[str, object], reason: FinishReason) -> None:
    replica = FakeReplica([says(tokens(0, 100, 101), ReplicaLost("died"))])
    answer = await replies(replica, **changes)
    assert ids(answer) == [100, 101]
    assert isinstance(answer[-1], TokenBatch)
    assert answer[-1].finish_reason is reason
    assert len(replica.requests) == 1


@pytest.mark.parametrize("taken", [0, 1])
async def test_closing_cancels_the_attempt_at_once(taken: int) -> None:
    replica = FakeReplica([says(tokens(0, 100), None)])
    changed = asyncio.Event()
    async with Generation(replica, generation_request(), changed) as generation:
        await changed.wait()
        if taken:
            assert generation.take() is not None
    assert replica.cancelled == 1
    assert generation.take() is None


async def test_closing_while_it_waits_to_try_again() -> None:
    slow = FailoverSettings(first_backoff_s=60, max_backoff_s=60)
    replica = FakeReplica([says(tokens(0, 100), ReplicaLost("died"))])
    changed = asyncio.Event()
    async with Generation(replica, generation_request(), changed, slow) as generation:
        await changed.wait()
        await asyncio.sleep(0.01)
    assert generation.ended
    assert len(replica.requests) == 1


class Translator:
    """A client whose transport turns our own cancellation into something else, as Ray's does."""

    def __init__(self, becomes: BaseException | None) -> None:
        self.becomes = becomes
        self.opened = 0

    async def open(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        self.opened += 1
        yield tokens(0, 100)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if self.becomes is not None:
                raise self.becomes from None

    async def model(self) -> ModelCard | LoadStage:
        raise AssertionError("not asked")


@pytest.mark.parametrize("becomes", [ReplicaLost("request cancelled"), None], ids=["ReplicaLost", "swallowed"])
async def test_our_own_cancellation_is_never_taken_for_a_loss(becomes: BaseException | None) -> None:
    client = Translator(becomes)
    changed = asyncio.Event()
    async with Generation(client, generation_request(), changed, QUICK):
        await changed.wait()
    await asyncio.sleep(0.01)
    assert client.opened == 1


@pytest.mark.parametrize("becomes", [ReplicaLost("request cancelled"), None], ids=["ReplicaLost", "swallowed"])
async def test_the_deadline_is_never_taken_for_a_loss(becomes: BaseException | None) -> None:
    client = Translator(becomes)
    answer = await replies(client, FailoverSettings(silence_s=5), remaining_s=0.03)
    assert isinstance(answer[-1], Failure)
    assert answer[-1].code is FailureCode.DEADLINE_EXCEEDED
    assert client.opened == 1


async def test_what_a_client_raises_against_its_contract_reaches_the_reader_after_the_tokens() -> None:
    replica = FakeReplica([says(tokens(0, 100), ZeroDivisionError("a bug"))])
    changed = asyncio.Event()
    seen: list[Reply] = []
    async with Generation(replica, generation_request(), changed, QUICK) as generation:
        stream = interleave({0: generation}, changed)
        seen.append((await anext(stream))[1])
        with pytest.raises(ZeroDivisionError):
            await anext(stream)
    assert ids(seen) == [100]


async def test_a_foreign_timeout_is_not_taken_for_ours() -> None:
    with pytest.raises(TimeoutError, match="theirs"):
        await replies(FakeReplica([says(TimeoutError("theirs"))]), remaining_s=60.0)


async def test_a_late_reader_gets_one_larger_batch() -> None:
    replica = FakeReplica([counts()])
    changed = asyncio.Event()
    async with Generation(replica, generation_request(), changed) as generation:
        for _ in TEN:
            await changed.wait()
            changed.clear()
        batch = generation.take()
    assert isinstance(batch, TokenBatch)
    assert list(batch.token_ids) == TEN
    assert batch.finish_reason is FinishReason.LENGTH


async def test_choices_are_interleaved_as_they_come_and_fail_apart() -> None:
    changed = asyncio.Event()
    fast, slow = FakeReplica([counts(pause_s=0.001)]), FakeReplica([counts(pause_s=0.003)])
    failing = FakeReplica([fails(Failure(FailureCode.OVERLOADED, "full"))])
    seen: list[tuple[int, Reply]] = []
    async with (
        Generation(fast, generation_request(), changed) as a,
        Generation(slow, generation_request(choice=1), changed) as b,
        Generation(failing, generation_request(choice=2), changed) as c,
    ):
        async for position, reply in interleave({0: a, 1: b, 2: c}, changed):
            seen.append((position, reply))
    assert ids([reply for position, reply in seen if position == 0]) == TEN
    assert ids([reply for position, reply in seen if position == 1]) == TEN
    assert [reply for position, reply in seen if position == 2] == [Failure(FailureCode.OVERLOADED, "full")]
    order = [position for position, _ in seen if position < 2]
    assert order != sorted(order)


async def test_closing_one_choice_does_not_end_the_others() -> None:
    changed = asyncio.Event()
    stuck, other = FakeReplica([says(tokens(0, 1), None)]), FakeReplica([counts(pause_s=0.002)])
    async with (
        Generation(stuck, generation_request(), changed) as a,
        Generation(other, generation_request(), changed) as b,
    ):
        seen = []
        async for position, reply in interleave({0: a, 1: b}, changed):
            seen.append((position, reply))
            if position == 0:
                await a.aclose()
    assert stuck.cancelled == 1
    assert ids([reply for position, reply in seen if position == 1]) == TEN


async def test_pauses_between_attempts_grow_up_to_their_cap() -> None:
    opened_at: list[float] = []

    def script(request: GenerationRequest) -> list[BaseException]:
        opened_at.append(asyncio.get_running_loop().time())
        return [ReplicaLost("killed")]

    await replies(FakeReplica([script]), FailoverSettings(first_backoff_s=0.1, max_backoff_s=1.0))
    pauses_s = [later - earlier for earlier, later in pairwise(opened_at)]
    assert len(pauses_s) == FailoverSettings().max_attempts - 1
    assert 0.05 <= pauses_s[0] <= 0.15
    assert 0.5 <= pauses_s[-1] <= 1.5


async def test_a_last_word_that_comes_with_tokens_while_the_reader_is_busy_is_handed_out() -> None:
    """As while a choice that a stop string ended is closed, beside another one that fails."""
    changed, goes_on = asyncio.Event(), asyncio.Event()

    class Fails(FakeReplica):
        async def open(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
            yield TokenBatch(0, (100,))
            await goes_on.wait()
            yield TokenBatch(1, (101,))
            yield Failure(FailureCode.ENGINE_FAILED, "broken")

    async with (
        Generation(FakeReplica([says(TokenBatch(0, (7,)), None)]), generation_request(), changed) as silent,
        Generation(Fails([]), generation_request(), changed) as failing,
    ):
        got: list[Reply] = []
        async for position, reply in interleave({0: silent, 1: failing}, changed):
            if position == 1:
                got.append(reply)
                goes_on.set()
                await asyncio.sleep(1)
            if isinstance(reply, Failure):
                await silent.aclose()
    assert got[:-1] == [TokenBatch(0, (100,)), TokenBatch(1, (101,))]
    assert isinstance(got[-1], Failure)


@pytest.mark.parametrize("delivered", [0, 1, 4])
async def test_the_prompts_logprobs_are_delivered_once_whenever_the_replica_dies(delivered: int) -> None:
    def dying(request: GenerationRequest) -> list[Reply | BaseException]:
        scores = prompt_scores(request)
        batches = [TokenBatch(i, (100 + i,), prompt_logprobs=scores if i == 0 else None) for i in range(delivered)]
        return [ALIVE, *batches, ReplicaLost("it died")]

    replica = FakeReplica([dying, counts()])
    answer = await replies(replica, prompt_logprobs=2)
    assert ids(answer) == TEN
    assert [request.needs_prompt_logprobs for request in replica.requests] == [True, delivered == 0]
    scores = [reply.prompt_logprobs for reply in answer if isinstance(reply, TokenBatch) and reply.prompt_logprobs]
    assert scores == [prompt_scores(generation_request(prompt_logprobs=2))]


async def test_a_request_for_no_token_ends_with_its_prompts_logprobs() -> None:
    replica = FakeReplica([says(ALIVE, ReplicaLost("it died")), counts()])
    (*_, last) = await replies(replica, max_new_tokens=0, prompt_logprobs=0)
    assert isinstance(last, TokenBatch)
    assert (last.token_ids, last.finish_reason) == ((), FinishReason.LENGTH)
    assert last.prompt_logprobs is not None
    assert len(replica.requests) == 2


async def test_a_request_for_nothing_needs_no_replica() -> None:
    replica = FakeReplica([says(ReplicaLost("never asked"))])
    (last,) = await replies(replica, max_new_tokens=0)
    assert isinstance(last, TokenBatch)
    assert (last.token_ids, last.finish_reason) == ((), FinishReason.LENGTH)
    assert replica.requests == []
