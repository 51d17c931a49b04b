from __future__ import annotations

import pytest
from fake_replica import generation_request, resolved
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import (
    Failure,
    FailureCode,
    FinishReason,
    GenerationRequest,
    GenerationStats,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
)
from serve_app.resume.records import (
    RecordError,
    StreamDocument,
    join_replies,
    read_document,
    read_record,
    write_document,
    write_reply,
)

ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(allow_nan=False)
entries = st.builds(TokenLogprobs, logprobs, st.lists(st.tuples(ids, logprobs), max_size=3).map(tuple))


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """What a generation hands out; of the counters a journal keeps the one that clients are told."""
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
def test_a_record_reads_as_it_was_written(replies: list[tuple[int, TokenBatch | Failure]]) -> None:
    assert list(read_record(join_replies([write_reply(*reply) for reply in replies]))) == replies


def test_a_token_costs_few_bytes() -> None:
    assert len(write_reply(0, TokenBatch(1234, (49151,)))) <= 16
    assert len(write_reply(0, TokenBatch(1234, tuple(range(40000, 40100))))) <= 6 * 100 + 12


samplings = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    repetition_penalty=st.floats(0.01, 100),
    logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100)), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    lambda **changes: generation_request(**changes),
    prompt_token_ids=st.lists(ids, max_size=5).map(tuple),
    sampling=samplings,
    remaining_s=st.none() | st.floats(0, 1000),
    choice=st.integers(0, 31),
)


settings = st.dictionaries(st.text(), st.none() | st.booleans() | st.text() | st.integers(-(2**53), 2**53))


@given(st.lists(requests, min_size=1, max_size=3).map(tuple), st.text(), st.text(), settings)
def test_a_document_reads_as_it_was_written(
    of_choices: tuple[GenerationRequest, ...], caller: str, wire_format: str, settings: dict[str, object]
) -> None:
    document = StreamDocument(resolved(*of_choices), caller, wire_format, settings)
    assert read_document(write_document(document)) == document


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"request": 1, "caller": "", "wire_format": ""}'])
def test_rubbish_is_no_document(content: bytes) -> None:
    with pytest.raises(RecordError):
        read_document(content)


@pytest.mark.parametrize(
    "record", [b"", b"\xff", b"7", b"[]", b"[1]", b"{}", b'[0,0,[1],null,"why",0]', b'{"code":"no","message":""}']
)
def test_rubbish_is_no_record(record: bytes) -> None:
    with pytest.raises(RecordError):
        list(read_record(record))
