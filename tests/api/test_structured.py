"""Structured output over the whole application: a replica that obeys grammars, and the process that checks them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from constrained_replica import ConstrainedReplica, small_replica
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from starlette.applications import Starlette

from serve_app import grammar
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.grammar import Vocabulary, load_vocabulary
from serve_app.grammar_checker import _Sandbox

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "seed": 5, "max_tokens": 400}
TEXT: dict[str, Any] = {"prompt": "Hi", "seed": 5, "max_tokens": 400}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
on_both = pytest.mark.parametrize(("url", "body"), ENDPOINTS, ids=["chat", "text"])

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CODES = ("invalid_value", "invalid_type", "invalid_json_schema", "missing_required_parameter", "unsupported_parameter")
GBNF = 'root ::= word ("-" word)*\nword ::= [a-c]+'


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}}


@pytest.fixture(scope="session")
def vocabulary(tokenizer_folder: Path) -> Vocabulary:
    return load_vocabulary(tokenizer_folder)


@pytest.fixture
def replica(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> ConstrainedReplica:
    return small_replica(vocabulary, tokenizer)


@pytest.fixture
async def api(
    replica: ConstrainedReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient]
) -> httpx.AsyncClient:
    return http(make_app(replica))


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


async def answered(api: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
    """The text of an answer that ended by itself."""
    response = await api.post(url, json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return text_of(choice)


async def refused(api: httpx.AsyncClient, body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    response = await api.post(url, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@on_both
@pytest.mark.parametrize(
    "asked",
    [
        schema_format(PERSON, strict=True),
        schema_format(PERSON),
        {"response_format": {"type": "json_schema", "schema": PERSON}},
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"json_schema": json.dumps(PERSON)},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON), "regex": None, "json_object": False}},
    ],
)
async def test_a_schema_is_obeyed(api: httpx.AsyncClient, url: str, body: dict[str, Any], asked: Any) -> None:
    jsonschema.validate(json.loads(await answered(api, url, {**body, **asked})), PERSON)


@on_both
@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
        ({"guided_regex": r"[a-c]{3}-\d+"}, r"[a-c]{3}-[0-9]+"),
        ({"regex": "^(yes|no)/$"}, "(yes|no)/"),
        ({"structured_outputs": {"regex": "x{2,5}"}}, "x{2,5}"),
        ({"guided_choice": ["red", 'a "b"\n', "é"]}, 'red|a "b"\n|é'),
        ({"structured_outputs": {"choice": ["red"]}}, "red"),
        ({"guided_grammar": 'start: "a" B\nB: /[xy]+/'}, "a[xy]+"),
        ({"ebnf": GBNF}, "[a-c]+(-[a-c]+)*"),
        ({"grammar": GBNF}, "[a-c]+(-[a-c]+)*"),
        ({"structured_outputs": {"grammar": GBNF}}, "[a-c]+(-[a-c]+)*"),
        ({"response_format": {"type": "grammar", "grammar": GBNF}}, "[a-c]+(-[a-c]+)*"),
    ],
)
async def test_so_is_any_other_kind(
    api: httpx.AsyncClient, url: str, body: dict[str, Any], asked: dict[str, Any], pattern: str
) -> None:
    for seed in range(3):
        text = await answered(api, url, {**body, **asked, "seed": seed})
        assert re.fullmatch(pattern, text, re.DOTALL), text
        if "{" in pattern and pattern.startswith(r"\{"):
            assert isinstance(json.loads(text), dict)


@on_both
async def test_text_is_no_constraint(
    api: httpx.AsyncClient, replica: ConstrainedReplica, url: str, body: dict[str, Any]
) -> None:
    for off in ({"response_format": {"type": "text"}}, {"guided_json": None, "regex": "", "structured_outputs": {}}):
        assert (await api.post(url, json={**body, **off})).status_code == 200
    assert [request.constraint for request in replica.requests] == ["", ""]


@on_both
async def test_every_choice_is_constrained_and_a_stream_tells_the_same(
    api: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> None:
    asked = {**body, **schema_format(PERSON), "n": 3}
    whole = (await api.post(url, json=asked)).json()["choices"]
    texts = [text_of(choice) for choice in whole]
    assert len(set(texts)) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    stream = (await api.post(url, json={**asked, "stream": True})).text
    told = ["", "", ""]
    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                told[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert told == texts


@on_both
async def test_a_replica_that_dies_does_not_break_the_structure(
    api: httpx.AsyncClient, replica: ConstrainedReplica, url: str, body: dict[str, Any]
) -> None:
    asked = {**body, **schema_format(PERSON)}
    text = await answered(api, url, asked)
    replica.dies_after = [3, 0, 2]
    assert await answered(api, url, asked) == text
    assert len(replica.requests) == 5
    assert len({request.constraint for request in replica.requests}) == 1


async def test_what_is_cut_says_so(api: httpx.AsyncClient) -> None:
    cut = (await api.post("/v1/chat/completions", json={**CHAT, **schema_format(PERSON), "max_tokens": 3})).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    stopped = {**CHAT, **schema_format(PERSON), "stop": '"name"'}
    choice = (await api.post("/v1/chat/completions", json=stopped)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "{")
    assert choice["message"]["refusal"] is None


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"response_format": 5}, "response_format", "An object is expected"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema", "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}}, "response_format.json_schema", "object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "Miss"),
        (schema_format(5), "response_format", "JSON Schema"),
        (schema_format([1]), "response_format", "JSON Schema"),
        (schema_format({"type": "foo"}), "response_format", "foo"),
        (schema_format({"not": {}}), "response_format", "the keyword 'not' can't be enforced"),
        (schema_format({"uniqueItems": True, "contains": 1, "type": "array"}), "response_format", "'uniqueItems'"),
        (schema_format({"minProperties": 3}), "response_format", "minProperties"),
        (schema_format({"minLength": 5, "maxLength": 3, "type": "string"}), "response_format", "minLength"),
        (schema_format({"$ref": "http://127.0.0.1:1/a.json"}), "response_format", "127.0.0.1"),
        (schema_format({"$ref": "#/$defs/a"}), "response_format", ""),
        (schema_format({"$ref": "#"}), "response_format", "nothing can match"),
        (schema_format({"x-guidance": {"lenient": True}}), "response_format", "x-guidance"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": '{"a": NaN}'}, "guided_json", "not valid JSON"),
        ({"guided_json": True}, "guided_json", "JSON Schema"),
        ({"json_schema": [1]}, "json_schema", "JSON Schema"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look"),
        ({"regex": 5}, "regex", "string"),
        ({"guided_choice": "a"}, "guided_choice", "list of strings"),
        ({"guided_choice": ["a", 5]}, "guided_choice", "list of strings"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
        ({"guided_grammar": "start: a\na[max_tokens=5]: /.*/"}, "guided_grammar", "max_tokens"),
        ({"guided_grammar": "start: <|nothing|>"}, "guided_grammar", "nothing"),
        ({"grammar": "root ::= foo"}, "grammar", "foo is missing"),
        ({"ebnf": "root ::= \\"}, "ebnf", "can't be read"),
        ({"structured_outputs": 5}, "structured_outputs", "object"),
        ({"structured_outputs": {"json": PERSON, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "boolean"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
        ({"regex": "a", "guided_choice": ["a"]}, "regex", "only one"),
        ({**schema_format(PERSON), "grammar": GBNF}, "grammar", "only one"),
    ],
)
async def test_what_can_not_be_used_is_refused_by_name(
    api: httpx.AsyncClient, replica: ConstrainedReplica, asked: dict[str, Any], param: str, says: str
) -> None:
    error = await refused(api, {**CHAT, **asked})
    assert error["param"] == param
    assert says in error["message"]
    assert error["code"] in CODES
    assert replica.requests == []


async def test_unknown_fields_inside_are_named(api: httpx.AsyncClient) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": PERSON, "x": 1}, "y": 1}
    response = await api.post("/v1/chat/completions", json={**CHAT, "response_format": asked})
    assert response.headers["x-ignored-fields"] == "response_format.json_schema.x, response_format.y"
    response = await api.post("/v1/completions", json={**TEXT, "structured_outputs": {"regex": "a", "x": 1}})
    assert response.headers["x-ignored-fields"] == "structured_outputs.x"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(length: int) -> dict[str, Any]:
    links = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)
    }  # fmt: skip
    return {"$defs": {**links, f"d{length}": {}}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, dict[str, Any]] = {
    "22 s and 600 MB": schema_format({"type": "integer", "multipleOf": 1234567}),
    "out of the stack": schema_format(chain(1000)),
    "out of the stack, in a grammar": {
        "guided_grammar": "start: a0\n" + "".join(f'a{i}: "x" a{i + 1}\n' for i in range(4000)) + 'a4000: "x"'
    },
    "out of the stack, in another grammar": {
        "grammar": "root ::= a0\n" + "".join(f'a{i} ::= "x" a{i + 1}\n' for i in range(4000)) + 'a4000 ::= "x"'
    },
    "too large": schema_format({"enum": ["x" * 300_000]}),
    "too many properties": schema_format({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
    "many alternatives": schema_format(
        {"allOf": [{"anyOf": [{"type": "object", "properties": {f"{k}{i}": {}}} for k in "pq"]} for i in range(16)]}
    ),
    "terminals that double": {
        "guided_grammar": "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "x"'
    },
    "deep parentheses": {"guided_grammar": f"start: {'(' * 5000}'a'{')' * 5000}"},
    "deep regex": {"guided_regex": "(" * 5000 + ")" * 5000},
    "deep schema": schema_format(nested(80)),
}


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of each question to the process that checks grammars."""
    original, threads = _Sandbox._try, list[threading.Thread]()

    def noted(self: _Sandbox, check: Any) -> str:
        threads.append(threading.current_thread())
        return original(self, check)

    monkeypatch.setattr(_Sandbox, "_try", noted)
    return threads


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
async def test_a_hostile_schema_is_refused_and_no_stream_waits(
    api: httpx.AsyncClient, hostile: str, tries: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    await answered(api, "/v1/chat/completions", {**CHAT, **schema_format(PERSON)})
    with monkeypatch.context() as patched:
        patched.setattr(grammar, "LLMatcher", None)  # nothing is compiled in this process
        error = await refused(api, {**CHAT, **HOSTILE[hostile]})
    assert error["code"] in ("invalid_json_schema", "invalid_value")
    assert threading.current_thread() not in tries, "the event loop waits for the other process"
    # and the process that checks is there for the next one
    await answered(api, "/v1/chat/completions", {**CHAT, "regex": "[a-d]+"})


async def test_a_verdict_is_asked_for_once(api: httpx.AsyncClient, tries: list[threading.Thread]) -> None:
    slow = {**CHAT, **schema_format({"type": "integer", "multipleOf": 1234567})}
    errors = await asyncio.gather(*(refused(api, slow) for _ in range(8)))
    assert {error["message"] for error in errors} == {errors[0]["message"]}
    assert await refused(api, slow) == errors[0]
    assert len(tries) == 2, "a short try and a long one"


class Step(BaseModel):
    explanation: str = Field(max_length=20)
    kind: Literal["add", "multiply"]


class Solution(BaseModel):
    steps: list[Step] = Field(max_length=3)
    answer: float | None
    inner: Solution | None = None


async def test_openais_client_parses_into_its_models(
    replica: ConstrainedReplica, make_app: Callable[..., Starlette], http: Callable[[Starlette], httpx.AsyncClient]
) -> None:
    client = AsyncOpenAI(api_key="unused", base_url="http://test/v1", http_client=http(make_app(replica)))
    for seed in range(5):
        completion = await client.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "Solve 2x = 4"}],
            response_format=Solution,
            seed=seed,
            max_completion_tokens=1000,
        )
        message = completion.choices[0].message
        assert isinstance(message.parsed, Solution)
        assert message.refusal is None
    async with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "Solve"}], response_format=Solution, seed=1
    ) as stream:
        async for _ in stream:
            pass
        assert isinstance((await stream.get_final_completion()).choices[0].message.parsed, Solution)


ANTHROPIC = {"model": "tiny", "max_tokens": 400, "seed": 3, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("name", ["output_config", "output_format"])
async def test_anthropics_format_is_obeyed_and_refused_by_name(api: httpx.AsyncClient, name: str) -> None:
    def asked(schema: dict[str, Any]) -> dict[str, Any]:
        wanted = {"type": "json_schema", "schema": schema}
        return {**ANTHROPIC, name: {"format": wanted} if name == "output_config" else wanted}

    answer = (await api.post("/v1/messages", json=asked(PERSON))).json()
    assert answer["stop_reason"] == "end_turn"
    jsonschema.validate(json.loads(answer["content"][0]["text"]), PERSON)
    refusal = await api.post("/v1/messages", json=asked({"not": {}}))
    assert refusal.status_code == 400
    assert "'not' can't be enforced" in refusal.json()["error"]["message"]
