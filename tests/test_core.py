"""What passes between processes is read as it was written, and a request knows when its output ends."""

from __future__ import annotations

import math
import pickle

import pytest
from fake_replica import generation_request
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationStats,
    MessageError,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
    decode_replies,
    encode_replies,
)

ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(allow_nan=False)
entries = st.builds(TokenLogprobs, logprobs, st.lists(st.tuples(ids, logprobs), max_size=3).map(tuple))


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """What a replica says."""
    tokens = tuple(draw(st.lists(ids, max_size=4)))
    reason = draw(st.none() | st.sampled_from(FinishReason))
    return TokenBatch(
        draw(st.integers(0, 10**6)),
        tokens,
        draw(st.none() | st.tuples(*(entries for _ in tokens))),
        reason,
        None if reason is None else GenerationStats(cached_prompt_tokens=draw(st.integers(0, 10**6))),
    )


failures = st.builds(Failure, st.sampled_from(FailureCode), st.text(), st.none() | st.floats(0, 1e6))


@given(st.lists(st.tuples(st.integers(0, 31), batches()) | st.tuples(st.just(0), failures), min_size=1, max_size=5))
def test_replies_read_as_they_were_written(replies: list[tuple[int, TokenBatch | Failure]]) -> None:
    assert decode_replies(encode_replies(replies)) == replies


def test_a_token_costs_few_bytes() -> None:
    assert len(encode_replies([(0, TokenBatch(1234, (49151,)))])) <= 16
    assert len(encode_replies([(0, TokenBatch(1234, tuple(range(40000, 40100))))])) <= 6 * 100 + 12


def test_an_impossible_token_and_a_last_bit_survive() -> None:
    batch = TokenBatch(0, (1, 2), (TokenLogprobs(-math.inf), TokenLogprobs(-0.1 - 2**-56)))
    assert decode_replies(encode_replies([(1, batch)])) == [(1, batch)]


@pytest.mark.parametrize("content", [b"", b"\xff", b"\x07", b"\x91\x90", b"\x91\x92\x00\x92\x02\x01", b"\x90\x90"])
def test_rubbish_is_no_message(content: bytes) -> None:
    with pytest.raises(MessageError):
        decode_replies(content)


def test_a_request_goes_to_a_replica_as_it_is() -> None:
    request = generation_request(sampling=SamplingParams(seed=2**64 - 1), output_token_ids=(5, 6))
    assert pickle.loads(pickle.dumps(request)) == request


@pytest.mark.parametrize(
    ("tokens", "last", "reason"),
    [(0, None, None), (1, 7, None), (2, 7, FinishReason.STOP), (2, 8, None), (3, 8, FinishReason.LENGTH)],
)
def test_an_output_ends_with_a_stop_id_after_min_tokens_or_at_its_limit(
    tokens: int, last: int | None, reason: FinishReason | None
) -> None:
    request = generation_request(max_new_tokens=3, stop_token_ids=(7,), sampling=SamplingParams(seed=1, min_tokens=1))
    assert request.finish_reason(tokens, last) is reason
