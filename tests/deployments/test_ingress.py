"""The ingress over HTTP, in front of the fake model server: while it loads, when it is there, when clients go."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from fake_model_server import CARD, FakeModelServer
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray import serve

from serve_app.config import AppConfig
from serve_app.deployments.ingress import Ingress

pytestmark = pytest.mark.ray

APP = "ingress"
TOKEN_S = 0.05
ACTOR: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0.1},
    "graceful_shutdown_timeout_s": 1,
    "graceful_shutdown_wait_loop_s": 0.1,
}
Until = Callable[..., httpx.Response]
get, post = partial(httpx.get, timeout=60), partial(httpx.post, timeout=60)


def application(config: AppConfig, *fake_args: object, replicas: int = 1) -> serve.Application:
    """An ingress in front of a fake model server."""
    options = {"num_replicas": replicas, **ACTOR}
    fake = serve.deployment(name="ModelServer", max_ongoing_requests=16, **options)(FakeModelServer)
    ingress = serve.deployment(name="Ingress", max_ongoing_requests=64, **options)(Ingress)
    return ingress.bind(config, fake.bind(config, *fake_args))


def is_ready(response: httpx.Response) -> bool:
    return response.status_code == 200


@pytest.fixture(scope="module")
def url(deployed: Callable[..., str], until: Until, text_folder: Path) -> str:
    """Two replicas of both."""
    config = AppConfig.model_validate({"model": {"source": str(text_folder), "generation": {"top_p": 0.9}}})
    url = deployed(application(config, TOKEN_S, replicas=2), APP)
    until(f"{url}/ready", is_ready, times=20)  # each of the two has loaded its tokenizer
    return url


def chat(max_tokens: int = 5) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens, "seed": 7}


def test_ready_shows_the_card(url: str) -> None:
    ready = get(f"{url}/ready").json()
    assert ready["model"]["fingerprint"] == CARD.fingerprint
    assert ready["generation"]["top_p"] == 0.9


def test_a_stream_of_documents(url: str) -> None:
    body = post(f"{url}/stream", json=chat()).text
    documents = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
    assert [document["token_id"] for document in documents[:-1]] == [217, 224, 231, 238, 245]
    assert documents[-1]["usage"]["completion_tokens"] == 5


def test_the_same_request_gets_the_same_answer_from_every_replica(url: str) -> None:
    answers = {post(f"{url}/stream", json=chat()).text for _ in range(6)}
    assert len(answers) == 1


def test_rays_metrics_endpoint_has_the_counters(url: str, until: Until) -> None:
    post(f"{url}/stream", json=chat(), headers={"X-Stream-Resume": "1"})
    [node] = [node for node in ray.nodes() if node["Alive"]]
    endpoint = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def own(response: httpx.Response) -> list[str]:
        return [line for line in response.text.splitlines() if f'application="{APP}"' in line]

    def journals(response: httpx.Response) -> float:
        return sum(float(line.split()[-1]) for line in own(response) if line.startswith("ray_serve_app_journals{"))

    assert journals(until(endpoint, lambda response: journals(response) > 0)) == 1  # told by one of the two ingresses
    lines = own(until(endpoint, lambda response: any("serve_app_generation_tokens" in line for line in own(response))))
    requests = [line for line in lines if line.startswith("ray_serve_app_requests_total")]
    assert any('endpoint="/stream"' in line and 'outcome="length"' in line for line in requests)


def test_the_service_itself_tells_the_metrics_of_all_its_replicas(url: str, until: Until) -> None:
    post(f"{url}/stream", json=chat())

    def families(response: httpx.Response) -> dict[str, list[Sample]]:
        return {family.name: family.samples for family in text_string_to_metric_families(response.text)}

    found = families(
        until(
            f"{url}/metrics", lambda response: len(families(response).get("serve_app_expected_wait_seconds", ())) == 2
        )
    )
    assert {sample.labels["application"] for samples in found.values() for sample in samples} == {APP}
    assert len({sample.labels["replica"] for sample in found["serve_app_expected_wait_seconds"]}) == 2
    answer = get(f"{url}/metrics")
    assert "ray_" not in answer.text
    found = families(until(f"{url}/metrics", lambda response: "serve_app_requests" in families(response)))
    ended = [sample for sample in found["serve_app_requests"] if sample.labels["endpoint"] == "/stream"]
    assert sum(sample.value for sample in ended) >= 1


def test_the_request_id_comes_back_once(url: str) -> None:
    given = post(f"{url}/stream", json=chat(), headers={"X-Request-Id": "my-own"})
    assert given.headers.get_list("x-request-id") == ["my-own"]
    made = post(f"{url}/stream", json=chat())
    assert len(made.headers.get_list("x-request-id")) == 1


def test_disconnect_detection_can_not_be_switched_off(url: str) -> None:
    refused = post(f"{url}/stream", json=chat(), headers={"x-request-disconnect-disabled": "?1"})
    assert refused.status_code == 400


def test_a_page_under_a_name_that_was_pointed_here_is_refused(url: str) -> None:
    """The ingress knows that Serve listens on loopback here, which its own config does not say."""
    refused = post(f"{url}/stream", json=chat(), headers={"Host": "evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
    foreign = get(f"{url}/stream?prompt=Hi", headers={"Sec-Fetch-Site": "cross-site"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "origin_not_allowed")


async def test_a_disconnect_stops_the_work(url: str) -> None:
    handle = serve.get_deployment_handle("ModelServer", APP)
    await handle.running.remote()  # a new handle knows no replica yet, and would ask none

    async def running() -> int:
        return sum(await handle.broadcast("running").results_async())

    body = chat(900)
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", f"{url}/stream", json=body) as response:
        assert response.status_code == 200
        pieces = response.aiter_bytes()  # held: a collected generator would close the connection
        await anext(pieces)
        assert await running() == 1
    async with asyncio.timeout(0.8 * 900 * TOKEN_S):
        while await running():  # noqa: ASYNC110 - of what other processes do
            await asyncio.sleep(0.01)


def test_while_the_model_loads(deployed: Callable[..., str], until: Until, text_folder: Path, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    config = AppConfig.model_validate({"model": {"source": str(text_folder)}})
    url = deployed(application(config, 0.01, loaded), "loading", wait=False)
    ready = until(f"{url}/ready", lambda response: response.status_code == 503 and "weights" in response.text)
    assert ready.json()["fraction"] == 0.5
    assert get(f"{url}/health").status_code == 200
    refused = post(f"{url}/stream", json=chat())
    assert refused.status_code == 503
    assert "loading weights" in refused.json()["error"]["message"]
    assert float(refused.headers["retry-after"]) > 0
    loaded.touch()
    until(f"{url}/ready", is_ready)
    assert post(f"{url}/stream", json=chat()).status_code == 200


def test_a_tokenizer_that_is_not_there_is_said(deployed: Callable[..., str], until: Until, tmp_path: Path) -> None:
    url = deployed(application(AppConfig.model_validate({"model": {"source": str(tmp_path)}})), "no-text", wait=False)
    ready = until(f"{url}/ready", lambda response: response.status_code == 503 and "error" in response.text)
    ready = until(f"{url}/ready", lambda response: '"failed"' in response.text)
    assert "holds no" in ready.json()["error"]
    assert post(f"{url}/stream", json=chat()).json()["error"]["code"] == "not_ready"


def test_a_request_wakes_a_deployment_that_was_scaled_to_zero(
    deployed: Callable[..., str], until: Until, text_folder: Path
) -> None:
    config = AppConfig.model_validate(
        {"model": {"source": str(text_folder)}, "model_server": {"autoscaling": {"min_replicas": 0}}}
    )
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 1,
        "max_replicas": 1,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 0.5,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0.5,
    }
    fake = serve.deployment(name="ModelServer", autoscaling_config=scaling, **ACTOR)(FakeModelServer)
    app = serve.deployment(name="Ingress", **ACTOR)(Ingress).bind(config, fake.bind(config))
    url = deployed(app, "asleep")
    until(f"{url}/ready", is_ready)
    deadline = time.monotonic() + 120
    while sum(serve.status().applications["asleep"].deployments["ModelServer"].replica_states.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert get(f"{url}/ready").status_code == 200
    assert get(f"{url}/v1/models").json()["data"][0]["id"] == CARD.name
    answer = post(f"{url}/stream", json=chat(), timeout=120)
    assert answer.text.count('"token_id"') == 5
