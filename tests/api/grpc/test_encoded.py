"""What is looked at before a protobuf message is decoded: its form, how many fields it has, and which."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.errors import ApiError
from serve_app.api.grpc.encoded import MAX_FIELDS, check
from serve_app.proto.jina_pb2 import DocProto, ListOfAnyProto, NodeProto, SingleDocumentRequestProto
from serve_app.proto.serve_app_pb2 import Message, PromptDocument


def refused(content: bytes, kind: Any = PromptDocument, *, strict: bool = False) -> tuple[str | None, str | None]:
    """The code and the param of the error; (None, None) without one."""
    try:
        check(content, kind.DESCRIPTOR, strict=strict)
    except ApiError as error:
        return error.code, error.param
    return None, None


texts = st.text(max_size=20)
prompts = st.builds(
    PromptDocument,
    prompt=st.none() | st.text(max_size=300),
    messages=st.lists(st.builds(Message, role=texts, content=texts, name=st.none() | texts), max_size=3),
    max_tokens=st.none() | st.integers(-(2**63), 2**63 - 1),
    temperature=st.none() | st.floats(),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(texts, max_size=3),
    parse_special=st.none() | st.booleans(),
)
nodes = st.recursive(
    st.builds(NodeProto, text=texts) | st.builds(NodeProto, integer=st.integers(-(2**31), 2**31 - 1)),
    lambda inner: st.builds(lambda data: NodeProto(list=ListOfAnyProto(data=data)), st.lists(inner, max_size=3)),
    max_leaves=10,
)
jinas = st.builds(
    lambda data: SingleDocumentRequestProto(document=DocProto(data=data)), st.dictionaries(texts, nodes, max_size=3)
)


@given(st.one_of(prompts, jinas))
def test_what_was_encoded_passes(message: Any) -> None:
    assert refused(message.SerializeToString(), type(message), strict=True) == (None, None)


@given(
    st.one_of(prompts, jinas),
    st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3),
)
def test_what_can_be_decoded_passes(message: Any, changes: list[tuple[int, bytes, int]]) -> None:
    """Bytes that were changed here and there: it refuses nothing as malformed that the decoder takes."""
    content = message.SerializeToString()
    for place, put, cut in changes:
        place %= len(content) + 1
        content = content[:place] + put + content[place + cut :]
    try:
        type(message).FromString(content)
    except DecodeError:
        return
    assert refused(content, type(message)) == (None, None)


@pytest.mark.parametrize(
    "content",
    [
        b"\x0a",  # no length
        b"\x0a\x05abc",  # cut
        b"\x12\x03\x0a\x05abcde",  # longer than the message that it is in
        b"\x39\x00",  # cut within 8 bytes
        b"\x18" + b"\xff" * 10 + b"\x01",  # more than 64 bits
        b"\x1c",  # the end of a group that has not begun
        b"\xfb\x01",  # a group without an end
        b"\x1e\x00",  # a wire type that there is not
        b"\x1f\x00",
    ],
)
def test_what_is_malformed_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        PromptDocument.FromString(content)
    assert refused(content) == ("invalid_protobuf", None)


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"\xf8\x01\x01", "#31"),
        (b"\xfb\x01\xfc\x01", "#31"),  # a group
        (b"\x08\x01", "#1"),  # a prompt that is a number
        (b"\x12\x00\x12\x04\xa2\x01\x01\x01", "messages[1].#20"),
    ],
)
def test_unknown_fields_are_named(content: bytes, param: str) -> None:
    assert refused(content) == (None, None)
    assert refused(content, strict=True) == ("unknown_parameter", param)


@pytest.mark.parametrize(
    "many", [b"\x12\x00", b"\x62\x00", b"\xf8\x01\x01", b"\x12\x03\xf8\x01\x01", b"\xfb\x01\xfc\x01", b"\x18\x00"]
)
def test_no_message_has_too_many_fields(many: bytes) -> None:
    assert refused(many * (MAX_FIELDS + 1))[0] == "invalid_value"


@pytest.mark.parametrize("depth", [30, 200, 2_000])
def test_depth_is_that_of_the_decoder(depth: int) -> None:
    content = b""
    for _ in range(depth):
        for tag in (b"\x0a", b"\x4a"):  # the data of a list, a list
            size = len(content)
            content = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + content
    if depth == 30:
        assert refused(content, NodeProto) == (None, None)
        NodeProto.FromString(content)
    else:
        assert refused(content, NodeProto) == ("invalid_protobuf", None)
        with pytest.raises(DecodeError):
            NodeProto.FromString(content)
