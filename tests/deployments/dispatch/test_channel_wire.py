"""What is read from a channel is what was put into it, and nobody gets one who does not know the secret."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import GenerationStats, TokenBatch, TokenLogprobs
from serve_app.deployments.dispatch.channel_wire import ChannelAddress, decode, encode, greeting, read_greeting

ADDRESS = ChannelAddress("127.0.0.1", 1234, "a-secret")

token_ids = st.integers(0, 2**31)
logprobs = st.floats(max_value=0, allow_nan=False)
batches = st.builds(
    TokenBatch,
    st.integers(0, 10_000),
    st.lists(token_ids, max_size=4).map(tuple),
    st.none()
    | st.lists(
        st.builds(TokenLogprobs, logprobs, st.lists(st.tuples(token_ids, logprobs), max_size=3).map(tuple)), max_size=4
    ).map(tuple),
    st.none(),
    st.none() | st.builds(GenerationStats, numerics_id=st.text(max_size=16)),
)


@given(st.lists(st.tuples(st.integers(1, 10**9), batches), max_size=5))
def test_what_is_read_is_what_was_put_in(items: list[tuple[int, TokenBatch]]) -> None:
    line = encode(items)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line[:-1]) == items


def test_an_impossible_token_and_a_last_bit_survive() -> None:
    batch = TokenBatch(0, (1, 2), (TokenLogprobs(-math.inf), TokenLogprobs(-0.1 - 2**-56)))
    assert decode(encode([(1, batch)])) == [(1, batch)]


def test_an_address_travels_as_text() -> None:
    assert ChannelAddress.parse(str(ADDRESS)) == ADDRESS
    assert ChannelAddress.parse("") is None
    assert "a-secret" not in repr(ADDRESS)


def test_who_knows_the_secret_is_let_in() -> None:
    assert read_greeting(greeting(ADDRESS, "me"), "a-secret") == "me"


@pytest.mark.parametrize(
    "line",
    [
        greeting(ADDRESS, ""),
        greeting(ChannelAddress("127.0.0.1", 1234, "another"), "me"),
        b"GET / HTTP/1.1\r",
        b"a-secret",
        b"a-secret ",
        b"a-secret\tme",
        b"A-SECRET me",
        b"\xff\xfe me",
        b"",
        b" ",
    ],
)
def test_others_are_not(line: bytes) -> None:
    assert read_greeting(line, "a-secret") is None
