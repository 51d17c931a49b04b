"""`text.format`: a text that matches a schema, in a replica that obeys grammars, as OpenAI's own client asks for it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from constrained_replica import ConstrainedReplica, small_replica
from pydantic import BaseModel
from responses_api import create, text_of
from starlette.applications import Starlette

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.grammar import Vocabulary, load_vocabulary

MakeApp = Callable[..., Starlette]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


class Person(BaseModel):
    """What the model is to say."""

    old: bool
    young: bool


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder: Path) -> Vocabulary:
    return load_vocabulary(tokenizer_folder)


@pytest.fixture
def replica(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> ConstrainedReplica:
    return small_replica(vocabulary, tokenizer)


@pytest.mark.parametrize("fields", [{}, {"store": False}])
async def test_a_text_matches_its_schema(
    replica: ConstrainedReplica, make_app: MakeApp, http: Callable[[Starlette], httpx.AsyncClient], fields: Any
) -> None:
    api = http(make_app(replica))
    format_ = {"type": "json_schema", "name": "person", "strict": True, "schema": SCHEMA}
    document = await create(api, text={"format": format_}, **fields)
    assert json.loads(text_of(document)).keys() == {"name", "old"}
    assert document["text"]["format"] == format_
    bad = {"type": "json_schema", "name": "x", "schema": {"type": "object", "unevaluatedItems": False}}
    refused = await api.post("/v1/responses", json={"input": "Hi", "text": {"format": bad}, **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text.format")


async def test_openais_client_parses_the_text(
    replica: ConstrainedReplica, make_app: MakeApp, serve: Callable[[Starlette], Awaitable[str]]
) -> None:
    url = await serve(make_app(replica))
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        parsed = await client.responses.parse(model="tiny", input="Hi", text_format=Person)
        assert isinstance(parsed.output_parsed, Person)
        async with client.responses.stream(model="tiny", input="Hi", text_format=Person) as stream:
            final = await stream.get_final_response()
        assert isinstance(final.output_parsed, Person)


@pytest.mark.parametrize(
    "ignored", [{"json_schema": "x"}, {"json_schema": [1]}, {"schema": {"x": float("inf")}}, {"grammar": 5}]
)
async def test_what_a_format_does_not_read_is_not_repeated(
    replica: ConstrainedReplica,
    make_app: MakeApp,
    http: Callable[[Starlette], httpx.AsyncClient],
    ignored: dict[str, Any],
) -> None:
    api = http(make_app(replica))
    body = json.dumps({"input": "Hi", "max_output_tokens": 3, "text": {"format": {"type": "text", **ignored}}}).replace(
        "Infinity", "1e999"
    )
    answer = await api.post("/v1/responses", content=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"]["format"] == {"type": "text"}
