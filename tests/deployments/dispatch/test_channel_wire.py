"""What is read from a channel is what was put into it, and nobody gets one who does not know the secret."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import FinishReason, MessageError, TokenBatch
from serve_app.deployments.dispatch.channel_wire import ChannelAddress, Frames, encode, greeting, read_greeting

ADDRESS = ChannelAddress("127.0.0.1", 1234, "a-secret")

items = st.lists(
    st.tuples(
        st.integers(1, 10**9),
        st.builds(
            TokenBatch,
            st.integers(0, 10_000),
            st.lists(st.integers(0, 2**31), max_size=300).map(tuple),
            st.none(),
            st.none() | st.sampled_from(FinishReason),
        ),
    ),
    max_size=5,
)


@given(st.lists(items, max_size=4), st.randoms(use_true_random=False))
def test_what_is_read_is_what_was_put_in_however_it_is_cut(
    messages: list[list[tuple[int, TokenBatch]]], chance: random.Random
) -> None:
    sent = b"".join(encode(items) for items in messages)
    cuts = sorted([0, len(sent), *(chance.randrange(len(sent) + 1) for _ in range(4))])
    frames = Frames()
    assert [items for begin, end in itertools.pairwise(cuts) for items in frames.feed(sent[begin:end])] == messages


@pytest.mark.parametrize("garbage", [b"nonsense\n", b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\x07", b"\x00\x00\x00\x00"])
def test_what_is_no_frame_is_told(garbage: bytes) -> None:
    with pytest.raises(MessageError):
        list(Frames().feed(garbage))


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
