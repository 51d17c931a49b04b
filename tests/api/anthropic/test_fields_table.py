"""The table of fields in docs/api.md is whole, and true: it is compared with the types of Anthropic's own package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params

from serve_app.api.anthropic.fields import CountFields, MessagesFields

PAGE = Path(__file__).parents[3] / "docs/api.md"
HEADERS = {"betas", "user_profile_id", "workspace_id"}
"""Parameters of the package's methods that it sends as headers."""
HI: dict[str, Any] = {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}


def table() -> dict[str, str]:
    """Field -> served, ignored, refused or no effect."""
    section = PAGE.read_text(encoding="utf-8").split("## Anthropic's messages")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| (\w[\w ]*?) \|", section, re.MULTILINE)
    return {name: how for names, how in rows for name in re.findall(r"`(\w+)`", names)}


def known() -> set[str]:
    """The fields of a body, in the package's types."""
    types = (
        message_create_params.MessageCreateParamsStreaming,
        message_count_tokens_params.MessageCountTokensParams,
        beta_params.MessageCreateParamsStreaming,
    )
    fields: set[str] = set()
    for kind in types:
        fields |= set(get_type_hints(kind))
    return fields - HEADERS


def test_every_field_of_the_package_is_in_the_table() -> None:
    assert known() - set(table()) == set()


def test_every_served_field_is_in_the_table() -> None:
    served = {name for name, how in table().items() if how == "served"}
    fields = {*MessagesFields.model_fields, *CountFields.model_fields}
    assert served == fields - {"context_management"}


@pytest.mark.parametrize(("name", "how"), [row for row in table().items() if row[1] != "served"])
async def test_the_table_says_what_happens(api: httpx.AsyncClient, name: str, how: str) -> None:
    value: Any = {"edits": [{"type": "clear_thinking_20251015"}]} if name == "context_management" else {"a": "b"}
    response = await api.post("/v1/messages", json={**HI, name: value})
    named = response.headers.get("x-ignored-fields", "")
    match how:
        case "refused":
            assert response.status_code == 400
            assert name in response.json()["error"]["message"]
        case "ignored":
            assert response.status_code == 200
            assert named.startswith(name)
        case _:
            assert how == "no effect"
            assert (response.status_code, named) == (200, "")
