"""Looks through an encoded protobuf message before it is decoded.

Promises that a message that passes is well-formed, has at most `MAX_FIELDS` fields, and, where its .proto is ours, no
field that is not in the .proto. Two million empty messages fit into 4 MiB; decoding them and reading them takes 10 s,
also of the event loop's time. Source of the format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections import Counter

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serve_app.api.errors import ApiError, bad_request, unknown_parameter

MAX_FIELDS = 32_768
"""In one message and those inside it. One takes 1.5 to 5 us here and when it is read."""
_MAX_DEPTH = 100
"""Messages inside one another. The decoder's own limit."""
_VARINT, _EIGHT_BYTES, _LENGTH, _GROUP_START, _GROUP_END, _FOUR_BYTES = range(6)
"""Wire types."""
_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _EIGHT_BYTES,
    FieldDescriptor.TYPE_STRING: _LENGTH,
    FieldDescriptor.TYPE_MESSAGE: _LENGTH,
}
"""Of the types in our .proto files; all others are varints."""


def check(content: bytes, kind: Descriptor, *, strict: bool) -> None:
    """Raise `ApiError` unless `content` can be decoded as a `kind`. `strict`: unknown fields are refused by name."""
    try:
        _Check(content, strict).message(0, len(content), kind, _MAX_DEPTH)
    except (IndexError, _Malformed):
        raise malformed(kind) from None
    except _Unknown as unknown:
        raise unknown_parameter(unknown.name) from None


def malformed(kind: Descriptor) -> ApiError:
    """400 for bytes that are no such message."""
    return bad_request(f"The request is not a {kind.full_name} message.", code="invalid_protobuf")


class _Malformed(Exception):
    pass


class _Unknown(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
        """As `messages[0].#20`."""


class _Check:
    def __init__(self, content: bytes, strict: bool) -> None:
        self._content = content
        self._strict = strict
        self._fields = 0

    def message(self, place: int, end: int, kind: Descriptor, depth: int) -> None:
        """Check the message between two places."""
        if not depth:
            raise _Malformed
        groups = 0
        seen: Counter[int] = Counter()
        while place < end:
            self._count()
            tag, place = self._varint(place)
            number, wire_type = tag >> 3, tag & 7
            field = None if groups else kind.fields_by_number.get(number)
            if field is not None and _WIRE_TYPES.get(field.type, _VARINT) != wire_type:
                field = None  # the decoder treats it as an unknown one
            if field is None and self._strict:
                raise _Unknown(f"#{number}")
            if wire_type == _GROUP_START:
                groups += 1
            elif wire_type == _GROUP_END and groups:
                groups -= 1
            else:
                begin, place = self._value(wire_type, place)
                if place > end:
                    raise _Malformed
                if field is not None and field.message_type is not None:
                    try:
                        self.message(begin, place, field.message_type, depth - 1)
                    except _Unknown as unknown:
                        raise _Unknown(f"{field.name}[{seen[number]}].{unknown.name}") from None
                    seen[number] += 1
        if groups:
            raise _Malformed

    def _count(self) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            message = f"The message has more than {MAX_FIELDS} fields; send less at once."
            raise bad_request(message, code="invalid_value")

    def _value(self, wire_type: int, place: int) -> tuple[int, int]:
        """Where the value of a field begins and ends; `place`: the first byte after its tag."""
        if wire_type == _LENGTH:
            size, place = self._varint(place)
            return place, place + size
        if wire_type == _VARINT:
            return place, self._varint(place)[1]
        if wire_type == _EIGHT_BYTES:
            return place, place + 8
        if wire_type == _FOUR_BYTES:
            return place, place + 4
        raise _Malformed

    def _varint(self, place: int) -> tuple[int, int]:
        """The number at a place, and the place after it."""
        value = shift = 0
        while True:
            byte = self._content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place
            shift += 7
            if shift >= 70:  # 64 bits take 10 bytes
                raise _Malformed
