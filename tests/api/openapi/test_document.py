"""The OpenAPI document: complete, valid, and true of what the application answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import httpx
import pytest
import schemathesis
from exploring import cases
from fake_replica import FakeReplica
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel, TypeAdapter
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks as openapi_checks
from starlette.applications import Starlette
from starlette.routing import Route

from serve_app.api.openapi import anthropic_answers, responses_answers
from serve_app.api.openapi import openai_answers as answers
from serve_app.api.openapi.document import openapi_document
from serve_app.api.openapi.operations import OPERATIONS

HI = [{"role": "user", "content": "Hi"}]
NOT_OPERATIONS = {"/openapi.json", "/docs", "/docs/{name}", "/", "/ui/{version}/{name}"}


def test_every_path_of_the_application_is_described(make_app: Callable[..., Starlette], replica: FakeReplica) -> None:
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in make_app(replica).routes
        if isinstance(route, Route) and route.path.replace(":path", "") not in NOT_OPERATIONS
        for method in route.methods or {"GET"}
        if method != "HEAD"
    }
    assert served == {(operation.method, operation.path) for operation in OPERATIONS}


async def test_it_is_served(api: httpx.AsyncClient) -> None:
    answer = await api.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == openapi_document()


def test_operations_have_names_of_their_own() -> None:
    names = [operation.name for operation in OPERATIONS]
    assert len(names) == len(set(names))


def test_fields_have_their_types_and_descriptions() -> None:
    schemas = openapi_document()["components"]["schemas"]
    completion = schemas["CompletionRequest"]["properties"]
    assert {kind["type"] for kind in completion["prompt"]["anyOf"]} == {"string", "array"}
    assert completion["prompt"]["description"].startswith("Text or token ids")
    assert schemas["ErrorAnswer"]["additionalProperties"] is False


def _data(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/chat/completions", {"messages": HI}, answers.ChatCompletion),
        ("/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 2, "n": 2}, answers.ChatCompletion),
        (
            "/v1/chat/completions",
            {"messages": HI, "return_token_ids": True, "prompt_logprobs": 1},
            answers.ChatCompletion,
        ),
        ("/v1/chat/completions", {"messages": HI, "service_tier": "auto"}, answers.ChatCompletion),
        ("/v1/completions", {"prompt": "Hi"}, answers.TextCompletion),
        (
            "/v1/completions",
            {"prompt": "Hi", "echo": True, "logprobs": 1, "return_token_ids": True, "prompt_logprobs": 0},
            answers.TextCompletion,
        ),
        ("/v1/completions", {"prompt": ["Hi", "Ho"], "logprobs": 2}, answers.TextCompletion),
        ("/v1/chat/completions", {"messages": "Hi"}, answers.ErrorAnswer),
        ("/v1/nothing", {}, answers.ErrorAnswer),
    ],
)
async def test_real_answers_have_their_type(
    api: httpx.AsyncClient, path: str, body: dict[str, Any], model: type[BaseModel]
) -> None:
    model.model_validate_json((await api.post(path, json=body)).content, strict=True)


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/chat/completions", {"messages": HI, "logprobs": True, "n": 2}, answers.ChatCompletionChunk),
        (
            "/v1/chat/completions",
            {"messages": HI, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            answers.ChatCompletionChunk,
        ),
        ("/v1/chat/completions", {"messages": HI, "return_token_ids": True}, answers.ChatCompletionChunk),
        ("/v1/completions", {"prompt": "Hi", "logprobs": 1}, answers.TextCompletion),
        (
            "/v1/completions",
            {"prompt": "Hi", "echo": True, "logprobs": 1, "return_token_ids": True},
            answers.TextCompletion,
        ),
    ],
)
async def test_real_events_have_their_type(
    api: httpx.AsyncClient, path: str, body: dict[str, Any], model: type[BaseModel]
) -> None:
    events = _data((await api.post(path, json={**body, "stream": True})).text)
    assert len(events) > 3
    for event in events:
        model.model_validate(event, strict=True)


MESSAGE = {"max_tokens": 50, "messages": HI}


async def test_anthropic_answers_have_their_types(api: httpx.AsyncClient) -> None:
    whole = await api.post("/v1/messages", json=MESSAGE)
    anthropic_answers.AnthropicMessage.model_validate_json(whole.content, strict=True)
    counted = await api.post("/v1/messages/count_tokens", json=MESSAGE)
    anthropic_answers.CountedTokens.model_validate_json(counted.content, strict=True)
    refused = await api.post("/v1/messages", json={})
    anthropic_answers.AnthropicError.model_validate_json(refused.content, strict=True)
    version = {"anthropic-version": "2023-06-01"}
    models = await api.get("/v1/models", headers=version)
    anthropic_answers.AnthropicModels.model_validate_json(models.content, strict=True)
    one = await api.get("/v1/models/tiny", headers=version)
    anthropic_answers.AnthropicModel.model_validate_json(one.content, strict=True)


async def test_anthropic_events_have_their_types(api: httpx.AsyncClient) -> None:
    events = _data((await api.post("/v1/messages", json={**MESSAGE, "stream": True})).text)
    types = {model.model_fields["type"].annotation.__args__[0]: model for model in anthropic_answers.EVENTS}
    for event in events:
        types[event["type"]].model_validate(event, strict=True)
    assert {event["type"] for event in events} == types.keys() - {"error"}


async def test_responses_have_their_types(api: httpx.AsyncClient) -> None:
    created = await api.post("/v1/responses", json={"input": "Hi", "top_logprobs": 1})
    responses_answers.ResponseDocument.model_validate_json(created.content, strict=True)
    path = f"/v1/responses/{created.json()['id']}"
    items = await api.get(f"{path}/input_items")
    responses_answers.ItemList.model_validate_json(items.content, strict=True)
    events = _data((await api.get(f"{path}?stream=true")).text)
    seen: TypeAdapter[Any] = TypeAdapter(reduce(or_, responses_answers.EVENTS))
    assert len({type(seen.validate_python(event, strict=True)) for event in events}) == 5
    deleted = await api.delete(path)
    responses_answers.DeletedResponse.model_validate_json(deleted.content, strict=True)
    for other, model in (
        ("/v1/responses/input_tokens", responses_answers.CountedInput),
        ("/v1/responses/compact", responses_answers.CompactedResponse),
    ):
        model.model_validate_json((await api.post(other, json={"input": "Hi"})).content, strict=True)


async def test_the_native_events_have_their_types(api: httpx.AsyncClient) -> None:
    *tokens, done = _data((await api.post("/stream", json={"prompt": "Hi"})).text)
    assert tokens
    for token in tokens:
        answers.StreamedToken.model_validate(token, strict=True)
    answers.StreamDone.model_validate(done, strict=False)


async def test_the_probes_and_the_models_have_their_types(api: httpx.AsyncClient) -> None:
    for path, model in (
        ("/health", answers.Health),
        ("/ready", answers.Ready),
        ("/v1/models", answers.ServedModels),
        ("/v1/models/tiny", answers.ServedModel),
    ):
        model.model_validate_json((await api.get(path)).content)


load_all_checks()
CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_any_request_gets_an_answer_of_the_document(
    operation: Any, make_app: Callable[..., Starlette], replica: FakeReplica
) -> None:
    """Schemathesis makes requests that fit the document and requests that don't."""
    app = make_app(replica)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    case_of = schema[operation.path][operation.method.upper()].as_strategy()

    @settings(
        max_examples=cases(15, exploring=150), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(case=case_of)
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    run()
