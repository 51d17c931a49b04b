"""What Ray's agents export of all nodes: the metrics of the whole application, its other replicas included.

Each node has an agent that collects the metrics of its processes every `metrics_report_interval_ms` (Ray's setting,
10 s by default), so values are up to that old. A replica that has died keeps its series there for a while.
"""

from __future__ import annotations

import asyncio
import logging

import httpx
import ray

from serve_app.api.errors import SERVER_ERROR, ApiError
from serve_app.observability.exposition import Exposition
from serve_app.observability.metrics import METRICS

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
"""For each node's answer. Prometheus itself waits for 10 s by default."""
RETRY_AFTER_S = 5.0
FRESH_S = 1.0
"""A scrape answers all who ask within this time: what is behind it changes more seldom."""


class NodeMetrics:
    """The metrics as `/metrics` shows them. Use it from one event loop."""

    def __init__(self, application: str) -> None:
        self._application = application
        # Ray's agents are no matter of a proxy for the outside.
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)
        self._scrape: asyncio.Task[bytes] | None = None
        self._made_at = 0.0

    async def text(self) -> bytes:
        """In Prometheus's text format. A node that does not answer is left out, with a warning in the log.

        Raises `ApiError` (503) if none answers: a scrape without any metric would look like a service without work.
        """
        loop = asyncio.get_running_loop()
        if self._scrape is None or (self._scrape.done() and loop.time() - self._made_at > FRESH_S):
            self._scrape = loop.create_task(self._make(), name="metrics")
            self._made_at = loop.time()
        return await asyncio.shield(self._scrape)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _make(self) -> bytes:
        nodes = await asyncio.to_thread(ray.nodes)
        urls = [
            f"http://{_host(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
            for node in nodes
            if node["Alive"] and node["MetricsExportPort"] > 0
        ]
        texts = [text for text in await asyncio.gather(*map(self._fetch, urls)) if text is not None]
        if not texts:
            message = "No Ray node tells its metrics at the moment; the ingress's log says why."
            raise ApiError(503, message, type=SERVER_ERROR, code="no_metrics", retry_after_s=RETRY_AFTER_S)
        return await asyncio.to_thread(self._exposed, texts)

    def _exposed(self, texts: list[str]) -> bytes:
        labels = {metric.name: metric.tag_keys for metric in METRICS}
        return Exposition(texts, self._application, labels).text()

    async def _fetch(self, url: str) -> str | None:
        try:
            answer = await self._http.get(url)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            logger.warning("no metrics from %s: %s", url, error or type(error).__name__)
            return None
        return answer.text


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
