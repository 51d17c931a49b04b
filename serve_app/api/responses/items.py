"""The items of a conversation as clients send them: checked, and in the form in which they are kept and listed.

Promises that an item that can't be served is refused by its name, and that no item is dropped in silence. Knows no
template and no store.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from serve_app.api.errors import ApiError, bad_request
from serve_app.api.responses.ids import input_item_id
from serve_app.api.unknown_fields import UnknownFields

Item = dict[str, Any]

_ROLES = ("user", "system", "developer", "assistant")
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_FIELDS: Mapping[str, frozenset[str]] = {
    "message": frozenset({"type", "role", "content", "id", "status", "phase"}),
    "function_call": frozenset({"type", "call_id", "name", "arguments", "id", "status"}),
    "function_call_output": frozenset({"type", "call_id", "output", "id", "status"}),
    "reasoning": frozenset({"type", "content", "summary", "id", "status"}),
    "compaction": frozenset({"type", "encrypted_content", "id", "created_by"}),
    "item_reference": frozenset({"type", "id"}),
}
"""Types that are served -> their fields; any other field is unknown."""
_PART_FIELDS = frozenset({"type", "text", "refusal", "annotations", "logprobs"})
_MAX_ID_CHARS = 200
_COMPACTED = "serve_app-1:"
"""How the content of our own compaction items begins."""


def read_items(raw: str | Sequence[Any], response_id: str, unknown: UnknownFields) -> list[Item]:
    """The items of a request's `input`, each with an id. References to items stay as they are: see `references`.

    Raises `ApiError`.
    """
    if isinstance(raw, str):
        raw = [{"role": "user", "content": raw}]
    if not raw:
        raise bad_request("input must have at least one item.", param="input", code="invalid_value")
    return [_item(each, f"input[{index}]", index, response_id, unknown) for index, each in enumerate(raw)]


def references(items: Sequence[Item]) -> Iterator[tuple[int, str]]:
    """(index, id of the item) of each reference."""
    return ((index, item["id"]) for index, item in enumerate(items) if item["type"] == "item_reference")


def text_of(item: Item) -> str:
    """The text of a message, a reasoning item or the output of a call. Parts are joined by newlines."""
    content = item["output"] if item["type"] == "function_call_output" else item["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", part.get("refusal", "")) for part in content)


def compaction(item_id: str, summary: str) -> Item:
    """The item that stands for a conversation of which this is the summary."""
    content = _COMPACTED + base64.urlsafe_b64encode(json.dumps({"summary": summary}).encode()).decode()
    return {"id": item_id, "type": "compaction", "encrypted_content": content}


def summary_of(item: Item) -> str:
    """The summary in an item that `compaction` has made. Raises ValueError for any other."""
    content = item["encrypted_content"]
    if not content.startswith(_COMPACTED):
        raise ValueError("not ours")
    try:
        # `from_json` limits how deep it reads, and refuses text that is not Unicode.
        summary = from_json(base64.urlsafe_b64decode(content.removeprefix(_COMPACTED)))["summary"]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError("not ours") from error
    if not isinstance(summary, str):
        raise ValueError("not ours")
    return summary


def _item(raw: Any, where: str, index: int, response_id: str, unknown: UnknownFields) -> Item:
    if not isinstance(raw, Mapping):
        raise _wrong(where, 'an item such as {"role": "user", "content": "Hi"}')
    kind = raw.get("type")
    if kind is None:  # OpenAI's short forms
        kind = "message" if "role" in raw else "item_reference"
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        message = f"{where}: items of type {_shown(kind)} are not served by this server."
        raise bad_request(message, param=f"{where}.type", code="unsupported_parameter")
    for name, value in raw.items():
        if name not in fields and value not in (None, "", [], {}):
            unknown.add_in(where, name)
    item_id = raw.get("id")
    if item_id is None and kind != "item_reference":
        item_id = input_item_id(response_id, kind, index)
    elif not isinstance(item_id, str) or not 0 < len(item_id) <= _MAX_ID_CHARS:
        raise _wrong(f"{where}.id", "the id of an item")
    return {"id": item_id, "type": kind, **_content(kind, raw, where, unknown)}


def _content(kind: str, raw: Mapping[str, Any], where: str, unknown: UnknownFields) -> Item:
    """The fields of an item besides its id and its type."""
    match kind:
        case "message":
            return _message(raw, where, unknown)
        case "function_call":
            named = {name: _text(raw.get(name), f"{where}.{name}") for name in ("call_id", "name", "arguments")}
            return {**named, "status": "completed"}
        case "function_call_output":
            call_id = _text(raw.get("call_id"), f"{where}.call_id")
            output = raw.get("output")
            if not isinstance(output, str):
                output = _parts(output, f"{where}.output", "input_text", unknown)
            return {"call_id": call_id, "output": output, "status": "completed"}
        case "reasoning":
            return {
                "summary": _reasoning(raw.get("summary"), f"{where}.summary", "summary_text"),
                "content": _reasoning(raw.get("content"), f"{where}.content", "reasoning_text"),
            }
        case "compaction":
            made = {
                "type": kind,
                "encrypted_content": _text(raw.get("encrypted_content"), f"{where}.encrypted_content"),
            }
            try:
                summary_of(made)
            except ValueError:
                message = f"{where}: this compaction was not made by this server, which can't read it."
                raise bad_request(message, param=f"{where}.encrypted_content", code="invalid_value") from None
            return made
    return {}


def _message(raw: Mapping[str, Any], where: str, unknown: UnknownFields) -> Item:
    role = raw.get("role")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    content = raw.get("content")
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    parts = _parts(content, f"{where}.content", kind, unknown)
    if role == "assistant":
        parts = [part if part["type"] == "refusal" else {**part, "annotations": []} for part in parts]
    return {"role": role, "content": parts, "status": "completed"}


def _parts(raw: Any, where: str, kind: str, unknown: UnknownFields) -> list[Item]:
    """Text parts, each in the form of `kind`."""
    if not isinstance(raw, list):
        raise _wrong(where, "a string or a list of parts")
    return [_part(part, f"{where}[{index}]", kind, unknown) for index, part in enumerate(raw)]


def _part(raw: Any, where: str, kind: str, unknown: UnknownFields) -> Item:
    if not isinstance(raw, Mapping):
        raise _wrong(where, 'a part such as {"type": "input_text", "text": "Hi"}')
    given = raw.get("type")
    for name, value in raw.items():
        if name not in _PART_FIELDS and value not in (None, "", [], {}):
            unknown.add_in(where, name)
    if given == "refusal" and kind == "output_text":
        return {"type": "refusal", "refusal": _text(raw.get("refusal"), f"{where}.refusal")}
    if not isinstance(given, str) or given not in _TEXT_PARTS:
        message = f"{where}: parts of type {_shown(given)} are not served by this server, which takes text only."
        raise bad_request(message, param=where, code="unsupported_parameter")
    return {"type": kind, "text": _text(raw.get("text"), f"{where}.text")}


def _reasoning(raw: Any, where: str, kind: str) -> list[Item]:
    if raw is None:
        return []
    if not isinstance(raw, list) or not all(isinstance(part, Mapping) for part in raw):
        raise _wrong(where, f"a list of parts of type {kind}")
    return [{"type": kind, "text": _text(part.get("text"), f"{where}[{n}].text")} for n, part in enumerate(raw)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a string")
    return value


def _wrong(where: str, expected: str) -> ApiError:
    return bad_request(f"Invalid value for '{where}': expected {expected}.", param=where, code="invalid_value")


def _shown(value: object) -> str:
    """A caller's own wrong value, short and printable."""
    return ascii(value[:40]) if isinstance(value, str) else "null" if value is None else f"of {type(value).__name__}"
