"""What is written of a stream is read again as it was, and rubbish is told."""

from __future__ import annotations

import pytest
from fake_replica import generation_request, resolved
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import GenerationRequest, MessageError, SamplingParams
from serve_app.resume.records import StreamDocument, read_document, write_document

ids = st.integers(0, 2**31 - 1)
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


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80", b"\xff", b"\x81\xa7request\x01"])
def test_rubbish_is_no_document(content: bytes) -> None:
    with pytest.raises(MessageError):
        read_document(content)
