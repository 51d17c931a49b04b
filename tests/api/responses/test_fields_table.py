"""The table of fields in docs/api.md is whole, and true: it is compared with the types of OpenAI's own package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import httpx
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from serve_app.api.responses.fields import ResponseRequest

PAGE = Path(__file__).parents[3] / "docs/api.md"


def table() -> dict[str, str]:
    """Field -> served, no effect, ignored or refused."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Responses\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| (served|no effect|ignored|refused) \|", section, re.MULTILINE)
    found: dict[str, str] = {}
    for names, how in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} is in the table twice"
            found[name] = how
    return found


TABLE = table()


def test_every_field_of_the_package_is_in_the_table() -> None:
    assert set(get_type_hints(ResponseCreateParamsStreaming)) - set(TABLE) == set()


def test_the_table_has_all_that_is_served() -> None:
    assert {name for name, how in TABLE.items() if how == "served"} == set(ResponseRequest.model_fields)


@pytest.mark.parametrize(("name", "how"), [row for row in TABLE.items() if row[1] != "served"])
async def test_the_table_says_what_happens(api: httpx.AsyncClient, name: str, how: str) -> None:
    response = await api.post("/v1/responses", json={"input": "Hi", name: {"a": "b"}})
    if how == "refused":
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    else:
        assert response.status_code == 200
        assert (name in response.headers.get("x-ignored-fields", "")) == (how == "ignored")
