"""The ids of responses and of their items.

A response's id is that of its stream, so any ingress finds its journal. An item's id names its response, so that an
`item_reference` finds it. Promises the same id for the same item, whichever ingress writes it.
"""

from __future__ import annotations

import re

from serve_app.resume.stream_id import new_stream_id

_RESPONSE = re.compile(r"resp_([A-Za-z0-9_-]{22})")
_ITEM = re.compile(r"(?:msg|rs|fc|fco|cmp)_([A-Za-z0-9_-]{22})[io][0-9]{1,6}")
KINDS = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "compaction": "cmp",
}
"""Type of an item -> how its id begins."""


def new_response_id() -> str:
    """It can't be guessed."""
    return f"resp_{new_stream_id()}"


def stream_id_of(response_id: str) -> str | None:
    """The stream of a response; None for a text that is no id of a response."""
    match = _RESPONSE.fullmatch(response_id)
    return None if match is None else match[1]


def output_item_id(response_id: str, kind: str, index: int) -> str:
    """The id of item number `index` of a response's output."""
    return f"{KINDS[kind]}_{response_id.removeprefix('resp_')}o{index}"


def input_item_id(response_id: str, kind: str, index: int) -> str:
    """The id of item number `index` of a request's input, if the client gave it none."""
    return f"{KINDS[kind]}_{response_id.removeprefix('resp_')}i{index}"


def response_of(item_id: str) -> str | None:
    """The id of the response that made the item's id; None for an id from elsewhere."""
    match = _ITEM.fullmatch(item_id)
    return None if match is None else f"resp_{match[1]}"
