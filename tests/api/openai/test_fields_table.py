"""The table of fields in docs/api.md is whole, and true: it is compared with the types of OpenAI's own package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from serve_app.api.openai.chat import ChatRequest
from serve_app.api.openai.completions import CompletionRequest

PAGE = Path(__file__).parents[3] / "docs/api.md"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, TEXT: {"prompt": "Hi"}}
MODELS = {CHAT: ChatRequest, TEXT: CompletionRequest}
TYPES: dict[str, Any] = {
    CHAT: chat_params.CompletionCreateParamsStreaming,
    TEXT: text_params.CompletionCreateParamsStreaming,
}


def table() -> dict[str, dict[str, str]]:
    """Path -> field -> served, ignored, refused or no effect."""
    section = PAGE.read_text(encoding="utf-8").split("## OpenAI's schemas")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| (\w[\w ]*?) \| (\w[\w ]*?) \|", section, re.MULTILINE)
    found: dict[str, dict[str, str]] = {CHAT: {}, TEXT: {}}
    for names, chat, text in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found[CHAT], f"{name} is in the table twice"
            found[CHAT][name], found[TEXT][name] = chat, text
    return found


ROWS = [(path, name, how) for path, fields in table().items() for name, how in fields.items()]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_every_field_of_the_package_is_in_the_table(path: str) -> None:
    assert set(get_type_hints(TYPES[path])) - set(table()[path]) == set()


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_table_has_all_that_is_served(path: str) -> None:
    assert {name for name, how in table()[path].items() if how == "served"} == set(MODELS[path].model_fields)


@pytest.mark.parametrize(("path", "name", "how"), [row for row in ROWS if row[2] != "served"])
async def test_the_table_says_what_happens(api: httpx.AsyncClient, path: str, name: str, how: str) -> None:
    response = await api.post(path, json={**BODIES[path], name: {"a": "b"}})
    named = response.headers.get("x-ignored-fields", "")
    if how == "refused":
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
    else:
        assert how in ("ignored", "no effect")
        assert (response.status_code, named) == (200, name if how == "ignored" else "")
