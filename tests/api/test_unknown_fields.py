from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica
from starlette.applications import Starlette

from serve_app.api.unknown_fields import NO_EFFECT, NOT_SERVED, safe_name

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"prompt": "Hi"}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
Http = Callable[[Starlette], httpx.AsyncClient]

on_both = pytest.mark.parametrize(("url", "body"), ENDPOINTS, ids=["chat", "text"])


@on_both
@pytest.mark.parametrize(
    ("stream", "headers"), [(False, {}), (True, {}), (True, {"X-Stream-Resume": "1"})], ids=["whole", "plain", "resume"]
)
async def test_unknown_fields_are_ignored_and_named(
    api: httpx.AsyncClient,
    replica: FakeReplica,
    caplog: pytest.LogCaptureFixture,
    url: str,
    body: dict[str, Any],
    stream: bool,
    headers: dict[str, str],
) -> None:
    asked = {**body, "seed": 1, "stream": stream, "stream_options": {"include_usage": stream}}
    with caplog.at_level("INFO", "serve_app.access"):
        plain = await api.post(url, json=asked, headers=headers)
        more = {"keep_alive": "5m", "nothing": None, "stream_options": {"include_usage": stream, "chunk_size": 5}}
        response = await api.post(url, json={**asked, **more}, headers=headers)
    assert "x-ignored-fields" not in plain.headers
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-fields"] == "keep_alive, stream_options.chunk_size"
    first, second = caplog.messages
    assert first.endswith(" ignored_fields=-")
    assert second.endswith(" ignored_fields=keep_alive,stream_options.chunk_size")
    assert replica.requests[0].sampling == replica.requests[1].sampling
    assert replica.requests[0].prompt_token_ids == replica.requests[1].prompt_token_ids


async def test_unknown_fields_of_messages_are_ignored_and_named_once(
    api: httpx.AsyncClient, replica: FakeReplica
) -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    await api.post("/v1/chat/completions", json={"messages": plain})
    full = [
        {"id": "1", "role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"id": "2", "role": "assistant", "content": "b", "reasoning": "hm", "reasoning_content": "hm", "refusal": None},
        {"id": "3", "role": "user", "content": "c", "createdAt": 5},
    ]
    response = await api.post("/v1/chat/completions", json={"messages": full})
    assert response.headers["x-ignored-fields"] == (
        "messages[].id, messages[].content[].cache_control, messages[].reasoning, messages[].reasoning_content, "
        "messages[].createdAt"
    )
    assert replica.requests[0].prompt_token_ids == replica.requests[1].prompt_token_ids


@on_both
async def test_names_are_safe_in_a_header_and_bounded(
    api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, url: str, body: dict[str, Any]
) -> None:
    nasty = ["a\r\nset-cookie: x=1", "é, b", "params", "__class__", "model_config", "\x00", 'q"', "x" * 10_000]
    with caplog.at_level("INFO", "serve_app.access"):
        response = await api.post(url, content=json.dumps({**body, **dict.fromkeys(nasty, 1)}))
    assert response.status_code == 200, response.text
    assert "set-cookie" not in response.headers
    names = response.headers["x-ignored-fields"].split(", ")
    assert names[:3] == ["a%0D%0Aset-cookie%3A%20x%3D1", "%C3%A9%2C%20b", "params"]
    assert len(names) == len(nasty)
    assert all(re.fullmatch(r"[!-~]{1,80}", name) for name in names)
    assert "\n" not in caplog.messages[-1]
    response = await api.post(url, json={**body, **{f"field{'x' * 100}{index}": 1 for index in range(5000)}})
    assert response.status_code == 200
    assert len(response.headers["x-ignored-fields"]) < 100
    response = await api.post(url, json={**body, **{f"field{index}": 1 for index in range(5000)}})
    names = response.headers["x-ignored-fields"].split(", ")
    assert (len(names), names[0], names[-1]) == (21, "field0", "...")


@pytest.mark.parametrize("name", ["é" * 5000, "\U0001f642" * 5000, "[1]" * 5000, " " * 5000])
def test_a_safe_name_is_short(name: str) -> None:
    assert re.fullmatch(r"[!-~]{1,1000}", safe_name(name))


@on_both
async def test_unknown_fields_can_be_refused(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Http, url: str, body: dict[str, Any]
) -> None:
    api = http(make_app(replica, unknown_fields="refuse"))
    for more, param in [
        ({"keep_alive": 5}, "keep_alive"),
        ({"stream_options": {"chunk_size": 5}}, "stream_options.chunk_size"),
        ({"x" * 1000: 1}, "x" * 100 + "..."),
    ]:
        response = await api.post(url, json={**body, **more})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unknown_parameter", param)
    allowed = {**dict.fromkeys(NO_EFFECT, "x"), "keep_alive": None, "tools": []}
    assert (await api.post(url, json={**body, **allowed})).status_code == 200


async def test_unknown_fields_of_messages_can_be_refused(
    replica: FakeReplica, make_app: Callable[..., Starlette], http: Http
) -> None:
    api = http(make_app(replica, unknown_fields="refuse"))
    response = await api.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a", "id": "1"}]})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_parameter", "messages[0].id")


@pytest.mark.parametrize(
    ("more", "param"),
    [({"keep_alive": 5}, "keep_alive"), ({"messages": [{"role": "user", "content": "a", "id": "1"}]}, "messages[0]")],
)
async def test_our_own_endpoint_refuses_them(api: httpx.AsyncClient, more: dict[str, Any], param: str) -> None:
    response = await api.post("/stream", json={**({} if "messages" in more else {"prompt": "Hi"}), **more})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)


NEITHER = {"messages", "prompt"}  # known to one endpoint each
SERVED_BY_TEXT = {"best_of", "add_special_tokens", "echo", "suffix"}
SERVED_BY_CHAT = {"tools", "tool_choice"}


@pytest.mark.parametrize(
    ("url", "body", "name"),
    [(*ENDPOINTS[0], name) for name in sorted(NOT_SERVED.keys() - NEITHER - SERVED_BY_CHAT)]
    + [(*ENDPOINTS[1], name) for name in sorted(NOT_SERVED.keys() - NEITHER - SERVED_BY_TEXT)],
)
async def test_what_would_change_the_answer_is_refused_by_name(
    api: httpx.AsyncClient, replica: FakeReplica, url: str, body: dict[str, Any], name: str
) -> None:
    for value in (0.123, "yes", ["yes"], {"yes": 1}):
        response = await api.post(url, json={**body, name: value})
        assert response.status_code == 400, (name, value)
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert replica.requests == []


@on_both
@pytest.mark.parametrize(
    ("asked", "off"),
    [
        ({"ban_eos_token": True}, {"ban_eos_token": False}),
        ({"add_bos_token": False}, {"add_bos_token": True}),
        ({"custom_token_bans": "13,14"}, {"custom_token_bans": ""}),
        ({"allowed_tokens": [5]}, {"allowed_tokens": []}),
        ({"dynamic_temperature": True}, {"dynamic_temperature": False}),
        ({"grammar_string": 'root ::= "a"'}, {"grammar_string": ""}),
        ({"min_length": 20}, {"min_length": 0}),
        ({"stopping_strings": ["a"]}, {"stopping_strings": []}),
        ({"stop_sequence": ["a"]}, {"stop_sequence": None}),
        ({"custom_stopping_strings": "a"}, {"custom_stopping_strings": ""}),
        ({"instruction_template_str": "{{ messages }}"}, {"instruction_template_str": ""}),
        ({"chat_template_str": "{{ messages }}"}, {"chat_template_str": ""}),
        ({"continue_": True}, {"continue_": False}),
    ],
)
async def test_what_text_generation_webui_and_tabby_call_it(
    api: httpx.AsyncClient, url: str, body: dict[str, Any], asked: dict[str, Any], off: dict[str, Any]
) -> None:
    response = await api.post(url, json={**body, **asked})
    assert (response.status_code, response.json()["error"]["param"]) == (400, *asked)
    response = await api.post(url, json={**body, **off})
    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers


@on_both
async def test_what_is_off_is_taken_in_silence(api: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    for value in (None, "", [], {}, False):
        off = dict.fromkeys(NOT_SERVED.keys() - NEITHER - SERVED_BY_TEXT, value)
        if value is not None:
            off |= {"add_bos_token": True, "do_sample": True, "skip_special_tokens": True}
        response = await api.post(url, json={**body, **off})
        assert response.status_code == 200, response.text
        assert "x-ignored-fields" not in response.headers
    for name, values in NOT_SERVED.items():
        for value in values:
            if not (body is TEXT and name in SERVED_BY_TEXT):
                response = await api.post(url, json={**body, name: value})
                assert response.status_code == 200, (name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", False),
        ("skip_special_tokens", False),
        ("num_beams", True),
        ("mirostat", True),
        ("typical_p", True),
    ],
)
async def test_a_boolean_is_no_number_and_off_is_not_always_the_default(
    api: httpx.AsyncClient, name: str, value: bool
) -> None:
    response = await api.post("/v1/completions", json={**TEXT, name: value})
    assert response.json()["error"]["param"] == name


async def test_each_endpoint_refuses_the_prompt_of_the_other(api: httpx.AsyncClient) -> None:
    response = await api.post("/v1/completions", json={**TEXT, "messages": CHAT["messages"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    response = await api.post("/v1/chat/completions", json={**CHAT, "prompt": "Hi"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    response = await api.post("/v1/chat/completions", json={**CHAT, "add_special_tokens": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "add_special_tokens")


@on_both
async def test_fields_without_effect_are_taken_whatever_they_hold(
    api: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> None:
    for value in (1, "x", {"a": "b"}, [1], True):
        response = await api.post(url, json={**body, **dict.fromkeys(NO_EFFECT, value)})
        assert response.status_code == 200
        assert "x-ignored-fields" not in response.headers
