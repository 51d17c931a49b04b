"""What Anthropic's clients read of an answer: the message, its blocks, its usage, and why it stopped.

Promises blocks in the order in which the model made them. Knows no events.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from pydantic_core import from_json

from serve_app.api.call_ids import call_id
from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart, joined
from serve_app.core import FinishReason
from serve_app.generation.completion import Usage
from serve_app.generation.request import ResolvedRequest
from serve_app.generation.text import Delta

CALL_PREFIX = "toolu_"


def message_document(
    settings: Mapping[str, Any], request: ResolvedRequest, gained: Sequence[Sequence[Delta]], usage: Usage
) -> dict[str, Any]:
    """A whole answer. `settings`: see `MessagesFormat`."""
    deltas = gained[0]
    parts = joined([part for delta in deltas for part in delta.parts])
    return {
        **opened_message(settings["id"], request.model),
        "content": _blocks(settings, parts),
        **stop_document(deltas[-1], request),
        "usage": {**usage_document(usage), "service_tier": "standard"},
    }


def opened_message(answer_id: str, model: str) -> dict[str, Any]:
    """A message that has not begun."""
    return {
        "id": answer_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def stop_document(last: Delta, request: ResolvedRequest) -> dict[str, Any]:
    """Why the answer stopped, from its last delta."""
    if last.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
    return {"stop_reason": _stop_reason(last, request), "stop_sequence": None}


def _stop_reason(last: Delta, request: ResolvedRequest) -> str:
    if last.finish_reason is FinishReason.TOOL_CALLS:
        return "tool_use"
    if last.finish_reason is FinishReason.LENGTH:
        # The caller's own limit was cut to what the context had left, so the context ended the answer.
        return "max_tokens" if request.cut_to is None else "model_context_window_exceeded"
    return "end_turn"


def usage_document(usage: Usage) -> dict[str, Any]:
    """Anthropic counts cached tokens of the prompt apart. Nobody pays for a cache to be written here."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def signature(thinking: bytes) -> str:
    """The signature of a thinking block, from the SHA-256 of its text. It is accepted back unchecked."""
    return b64encode(thinking).decode()


def _blocks(settings: Mapping[str, Any], parts: Iterable[Part]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        match part:
            case TextPart():
                blocks.append({"type": "text", "text": part.text})
            case ReasoningPart():
                text = "" if settings["omit_thinking"] else part.text
                signed = signature(sha256(part.text.encode()).digest())
                blocks.append({"type": "thinking", "thinking": text, "signature": signed})
            case CallPart():
                made = call_id(settings["id"], 0, part.number, CALL_PREFIX)
                calls[part.number] = {"type": "tool_use", "id": made, "name": part.name, "input": {}}
                blocks.append(calls[part.number])
            case ArgumentsPart():
                arguments[part.number] = arguments.get(part.number, "") + part.text
    for number, text in arguments.items():
        calls[number]["input"] = _input(text)
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call. Of those that a token limit cut, what is whole: a stream's reader gets the same."""
    try:
        value = from_json(arguments, allow_partial=True, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is read as Infinity, which is no JSON
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
