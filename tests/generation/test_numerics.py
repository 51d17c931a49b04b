"""A stream asks to be continued by a replica that computes as the one that began it did, and says when none did."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fake_replica import FakeReplica, Script, generation_request, says
from msgspec.structs import replace

from serve_app.core import FinishReason, GenerationStats, TokenBatch, decode_replies, encode_replies
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.attempts import Generation, interleave
from serve_app.generation.replica import ReplicaLost

pytestmark = pytest.mark.usefixtures("exact_time")  # else a stall would look like a silent replica

QUICK = FailoverSettings(first_backoff_s=0.001, max_backoff_s=0.002)


def token(index: int, numerics_id: str | None = None, finish: FinishReason | None = None) -> TokenBatch:
    stats = None if numerics_id is None else GenerationStats(numerics_id=numerics_id)
    return TokenBatch(index, (100 + index,), finish_reason=finish, stats=stats)


async def asked_for(*scripts: Script, prior: TokenBatch | None = None) -> list[str]:
    """What each attempt of a stream of three tokens asked for."""
    changed = asyncio.Event()
    replica = FakeReplica(list(scripts))
    async with Generation(replica, generation_request(), changed, QUICK, prior) as generation:
        async for _ in interleave({0: generation}, changed):
            pass
    return [request.numerics_id for request in replica.requests]


LAST = FinishReason.LENGTH


async def test_every_attempt_asks_for_that_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    first = says(token(0, "a"), 0.001, ReplicaLost("died"))
    second = says(token(1, "b"), 0.001, ReplicaLost("died"))
    third = says(token(2, "a", LAST))
    assert await asked_for(first, second, third) == ["", "a", "a"]
    assert "may differ" not in caplog.text


async def test_an_end_elsewhere_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await asked_for(says(token(0, "a"), 0.001, ReplicaLost("died")), says(token(1, "b"), token(2, "b", LAST)))
    assert "the answer may differ from an undisturbed one" in caplog.text


async def test_where_nothing_is_promised_any_will_do(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    first = says(token(0, ""), 0.001, ReplicaLost("died"))
    assert await asked_for(first, says(token(1, ""), token(2, "", LAST))) == ["", ""]
    assert "may differ" not in caplog.text


async def test_one_that_takes_over_from_a_journal_asks_for_it_too() -> None:
    ((_, prior),) = decode_replies(encode_replies([(0, token(0, "a"))]))
    assert isinstance(prior, TokenBatch)
    assert prior == replace(token(0, "a"))
    assert await asked_for(says(token(1, "a"), token(2, "a", LAST)), prior=prior) == ["a"]
