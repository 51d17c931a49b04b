"""What `/metrics` makes of the answers of the nodes' agents: no Ray needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from serve_app.api.errors import ApiError
from serve_app.deployments import node_metrics
from serve_app.deployments.node_metrics import NodeMetrics

Answer = Callable[[httpx.Request], httpx.Response]
QUEUED = (
    '# TYPE ray_serve_app_queued gauge\nray_serve_app_queued{{application="chat",priority="batch",replica="{}"}} 2.0\n'
)


def node(address: str, *, alive: bool = True, port: int = 8080) -> dict[str, object]:
    return {"NodeManagerAddress": address, "MetricsExportPort": port, "Alive": alive}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    found = [node("10.0.0.1"), node("fd00::2")]
    monkeypatch.setattr(node_metrics.ray, "nodes", lambda: found)
    return found


def asking(answer: Answer) -> NodeMetrics:
    made = NodeMetrics("chat")
    made._http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return made


async def test_all_living_nodes_are_asked_once_for_all_who_ask(nodes: list[dict[str, object]]) -> None:
    nodes += [node("10.0.0.3", alive=False), node("10.0.0.4", port=0)]
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, text=QUEUED.format(request.url.host))

    metrics = asking(answer)
    texts = await asyncio.gather(*(metrics.text() for _ in range(5)))
    assert sorted(asked) == ["http://10.0.0.1:8080/metrics", "http://[fd00::2]:8080/metrics"]
    assert len(set(texts)) == 1
    assert texts[0].count(b"serve_app_queued{") == 2
    await metrics.aclose()


async def test_a_node_that_does_not_answer_is_left_out(
    nodes: list[dict[str, object]], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "10.0.0.1":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, text=QUEUED.format("b"))

    assert (await asking(answer).text()).count(b"serve_app_queued{") == 1
    assert "no metrics from http://10.0.0.1:8080/metrics: refused" in caplog.text


async def test_no_answer_at_all_is_no_service_without_work(nodes: list[dict[str, object]]) -> None:
    metrics = asking(lambda request: httpx.Response(500))
    with pytest.raises(ApiError) as refused:
        await metrics.text()
    assert (refused.value.status, refused.value.code) == (503, "no_metrics")
