"""Answers put together from recorded events: what is out of place in a protocol is noted or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from httpx_sse import ServerSentEvent

from loadtest.chaos_replies import new_reply
from loadtest.outcome import Outcome
from loadtest.workload import Mode, Question, Visit, Wire

RESPONSE = "resp_" + "r" * 22
USAGE = {"input_tokens": 3, "output_tokens": 2}
MESSAGE_USAGE = {"input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 2}


def outcome(mode: Mode = Mode.RESUME) -> Outcome:
    return Outcome(Visit(0, 0.0, 0, mode), 0.0)


def play(wire: Wire, events: list[dict[str, Any]], mode: Mode = Mode.RESUME) -> tuple[Any, Outcome]:
    seen = outcome(mode)
    reply = new_reply(Question(wire, {"max_tokens": 9, "max_output_tokens": 9}))
    for event in events:
        reply.take(ServerSentEvent(event=event.get("type", ""), data=json.dumps(event)), seen)
    return reply, seen


def response(*deltas: str, said: str | None = None) -> list[dict[str, Any]]:
    part = {"type": "output_text", "text": "".join(deltas) if said is None else said, "logprobs": []}
    whole = {"status": "completed", "output": [{"type": "message", "content": [part]}], "usage": USAGE}
    events = [
        {"type": "response.created", "response": {"id": RESPONSE}},
        *({"type": "response.output_text.delta", "delta": delta} for delta in deltas),
        {"type": "response.completed", "response": whole},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def message(*events: dict[str, Any], stop: str = "end_turn") -> list[dict[str, Any]]:
    return [
        {"type": "message_start", "message": {"usage": MESSAGE_USAGE}},
        *events,
        {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": MESSAGE_USAGE},
        {"type": "message_stop"},
    ]


def begun(index: int, kind: str, **fields: str) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": {"type": kind, **fields}}


def more(index: int, kind: str, **fields: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def stopped(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


def test_a_response_is_resumed_by_its_id_and_number() -> None:
    reply, seen = play(Wire.RESPONSES, response("Hi ", "you")[:3])
    assert seen.stream_id == "r" * 22
    assert reply.last_event_id == "2"
    assert reply.next_index == 3
    assert not reply.over
    _, plain = play(Wire.RESPONSES, response("Hi")[:2], Mode.PLAIN)
    assert plain.stream_id == "", "an answer that is not kept can only be asked for again"


def test_a_response_whose_events_and_document_differ_is_noted() -> None:
    reply, seen = play(Wire.RESPONSES, response("Hi ", "you"))
    assert not seen.faults
    assert reply.answer().texts == ("Hi you",)
    _, seen = play(Wire.RESPONSES, response("Hi ", "you", said="Hi you you"))
    assert "the whole response says" in seen.faults[0]


def test_numbers_of_a_response_go_up_by_one() -> None:
    events = response("a", "b", "c")
    _, seen = play(Wire.RESPONSES, [*events[:2], *events[3:]])
    assert seen.faults[0] == "event 3 where 2 was due"
    _, seen = play(Wire.RESPONSES, [*events[:3], *events[2:]])
    assert seen.repeated_events
    _, seen = play(Wire.RESPONSES, events[1:])
    assert seen.faults == ["the first event has index 1"]


def test_a_response_that_failed_is_an_error() -> None:
    failed = {"status": "failed", "error": {"code": "server_error", "message": "lost"}}
    with pytest.raises(ValueError, match="server_error: lost"):
        play(Wire.RESPONSES, [{"type": "response.failed", "response": failed, "sequence_number": 0}])
    told = {"type": "error", "code": "stream_gone", "message": "expired", "sequence_number": 0}
    with pytest.raises(ValueError, match="stream_gone: expired"):
        play(Wire.RESPONSES, [told])


def test_a_message_of_all_blocks() -> None:
    events = message(
        begun(0, "thinking"),
        more(0, "thinking_delta", thinking="Hm."),
        more(0, "signature_delta", signature="s"),
        stopped(0),
        begun(1, "text"),
        more(1, "text_delta", text="I look."),
        stopped(1),
        begun(2, "tool_use", name="f"),
        more(2, "input_json_delta", partial_json='{"a": '),
        more(2, "input_json_delta", partial_json="1}"),
        stopped(2),
        stop="tool_use",
    )
    reply, seen = play(Wire.MESSAGES, events)
    answer = reply.answer()
    assert not seen.faults
    assert (answer.texts, answer.reasoning) == (("I look.",), ("Hm.",))
    assert answer.calls == ((("f", '{"a": 1}'),),)
    assert (answer.finish_reasons, answer.prompt_tokens, answer.completion_tokens) == (("tool_use",), 3, 2)


def test_blocks_that_are_out_of_place_are_noted_or_refused() -> None:
    _, seen = play(Wire.MESSAGES, message(begun(1, "text"), stopped(1)))
    assert seen.faults == ["block 1 began where 0 was due"]
    with pytest.raises(ValueError, match="text_delta in a block of the type none"):
        play(Wire.MESSAGES, message(more(0, "text_delta", text="x")))
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "later"}}
    with pytest.raises(ValueError, match="overloaded_error: later"):
        play(Wire.MESSAGES, [error])


def chunk(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}


def test_calls_of_a_chat() -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": "{}"}}
    reply, seen = play(Wire.CHAT, [chunk(reasoning_content="Hm."), chunk(tool_calls=[first]), chunk(tool_calls=[rest])])
    assert not seen.faults
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    reply.take(ServerSentEvent(data=json.dumps(usage)), seen)
    assert reply.answer().calls == ((("f", "{}"),),)
    assert reply.answer().reasoning == ("Hm.",)
    with pytest.raises(ValueError, match="arguments of call 1, and call 0 is open"):
        play(Wire.CHAT, [chunk(tool_calls=[first]), chunk(tool_calls=[{**rest, "index": 1}])])
