"""The events of any answer make the same message as its whole document, however its parts came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic.lib.streaming._messages as client_streaming
import pytest
from anthropic.types import RawMessageStreamEvent
from fake_replica import generation_request, resolved
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from serve_app.api.anthropic.documents import message_document
from serve_app.api.anthropic.events import MessageWriter
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart
from serve_app.core import FinishReason
from serve_app.generation.completion import Usage
from serve_app.generation.text import Delta

REQUEST = resolved(generation_request())
USAGE = Usage(3, 1, 9, 2)
EVENTS: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
arguments = st.sampled_from(['{"city": "Röme", "days": [1, 2]}', "{}", '{"a": {"b": null}}', '{"cut": "sho', ""])


@st.composite
def answers(draw: st.DrawFn) -> list[Part]:
    """The parts of an answer, calls whole: one after the other."""
    parts: list[Part] = []
    number = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thinking", "call"]), max_size=6)):
        match kind:
            case "text":
                parts += [TextPart(text) for text in draw(st.lists(texts, min_size=1, max_size=3))]
            case "thinking":
                parts += [ReasoningPart(text) for text in draw(st.lists(texts, min_size=1, max_size=3))]
            case _:
                made = draw(arguments)
                cut = draw(st.integers(0, len(made)))
                parts.append(CallPart(number, draw(st.sampled_from(["weather", "a.b-c"]))))
                parts += [ArgumentsPart(number, piece) for piece in (made[:cut], made[cut:]) if piece]
                number += 1
    return parts


def in_deltas(parts: Sequence[Part], sizes: Sequence[int], stop: str | None) -> list[Delta]:
    """The same parts in deltas of these sizes; the last delta ends the answer."""
    deltas: list[Delta] = []
    left = list(parts)
    for size in sizes:
        deltas.append(Delta(0, (), (), None, None, tuple(left[:size])))
        del left[:size]
    return [*deltas, Delta(0, (), (), None, FinishReason.STOP, tuple(left), stop)]


@given(answers(), st.lists(st.integers(0, 3), max_size=12), st.sampled_from([None, "\u2028 stop"]), st.booleans())
def test_events_make_the_whole_message(parts: list[Part], sizes: list[int], stop: str | None, omits: bool) -> None:
    settings = {"id": "msg_1", "omit_thinking": omits}
    deltas = in_deltas(parts, sizes, stop)
    writer = MessageWriter(REQUEST, settings)
    written = [*writer.opened(), *(event for delta in deltas for event in writer.gained(delta)), *writer.ended(USAGE)]
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in written:
        name, data, *rest = event.decode().split("\n")
        assert rest == ["", ""]
        parsed = EVENTS.validate_json(data.removeprefix("data: "))
        assert name == f"event: {parsed.type}"
        snapshot = client_streaming.accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    whole = message_document(settings, REQUEST, [deltas], USAGE)
    told = snapshot.to_dict()
    assert [shown(block) for block in told["content"]] == [shown(block) for block in whole["content"]]
    for name in ("id", "role", "model", "stop_reason", "stop_sequence"):
        assert told[name] == whole[name]
    for name, value in whole["usage"].items():
        assert told["usage"][name] == value


def shown(block: dict[str, Any]) -> dict[str, Any]:
    """Without what the client adds to a block."""
    return {name: value for name, value in block.items() if value is not None}


@given(answers(), st.lists(st.integers(0, 3), max_size=12))
def test_however_parts_come_the_whole_message_is_the_same(parts: list[Part], sizes: list[int]) -> None:
    settings = {"id": "msg_1", "omit_thinking": False}
    one, other = (message_document(settings, REQUEST, [in_deltas(parts, cuts, None)], USAGE) for cuts in ((), sizes))
    assert one == other


@pytest.mark.parametrize(
    "arguments", ['{"a": 1e999}', '{"a": NaN}', '{"a": [-1e999]}', '{"a": ' + "[" * 1100, "9" * 5000]
)
def test_arguments_that_are_no_json_are_an_empty_input(arguments: str) -> None:
    delta = Delta(0, (), (), None, FinishReason.TOOL_CALLS, (CallPart(0, "now"), ArgumentsPart(0, arguments)))
    document = message_document({"id": "msg_1", "omit_thinking": False}, REQUEST, [[delta]], USAGE)
    assert document["content"][0]["input"] == {}
    json.dumps(document, allow_nan=False)
