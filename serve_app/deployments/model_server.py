"""The deployment that owns a model: its weights, its KV cache and one engine. Ids in, ids out.

Promises visible progress while it loads, one clear sentence when it can't, and that a closed stream stops its work
within one engine step. Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import ray
from ray import serve

from serve_app.config import AppConfig
from serve_app.core import GenerationRequest, LoadStage, ModelCard, Reply
from serve_app.deployments.dispatch.channel_writer import TokenChannels, send
from serve_app.deployments.dispatch.liveness import IngressLiveness
from serve_app.deployments.dispatch.poison import PoisonNotes
from serve_app.deployments.dispatch.router import CHANNEL_KEY, FINGERPRINT_KEY, NUMERICS_KEY
from serve_app.deployments.garbage import freeze
from serve_app.deployments.logs import use_serve_log
from serve_app.deployments.metrics import RayMetrics
from serve_app.deployments.revisions import settled
from serve_app.deployments.status.progress import ProgressBoard, Reporter
from serve_app.engine.engine_error import EngineError
from serve_app.models.model_error import ModelError
from serve_app.observability.metrics import (
    ACCEPTED_TOKENS,
    CACHE_USE,
    DRAFTED_TOKENS,
    NO_TAGS,
    PREEMPTIONS,
    RUNNING,
    STEP_TIME_S,
    STEPS,
    WAITING,
    Metric,
    MetricsSink,
)

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine, EngineStats
    from serve_app.models.loader import LoadedModel

logger = logging.getLogger(__name__)

STALL_LIMIT_S = 120.0
"""A step that runs longer has hung. Steps are bounded by `max_step_tokens`: 512 tokens take about 1 s with the demo
model on the 2-core machine, so a model 50 times as large is still called healthy there."""
METRICS_PERIOD_S = 1.0


class ModelServer:
    """One replica. Its constructor returns when the model can serve."""

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """Fetch, load and check the model, and start the engine. Raises `ModelError` or `EngineError`."""
        use_serve_log()
        replica = serve.get_replica_context()
        board = ProgressBoard(replica.app_name, config)
        if refusal := await asyncio.to_thread(board.refusal):
            board.report(LoadStage("failed", error=refusal))
            raise ModelError(refusal)
        deployed_at = asyncio.create_task(asyncio.to_thread(board.deployed_at))  # now: a later deploy may fix it
        note_suspect = partial(PoisonNotes(replica.app_name).write, replica.replica_id.unique_id)
        try:
            # In threads, so that this loop can answer Serve, which asks whether the replica is alive.
            report = Reporter(board.report)
            config = await asyncio.to_thread(settled, config, board, replica.app_name, replica.deployment, report)
            self._engine, card = await asyncio.to_thread(self._start, config, report, note_suspect)
        except (ModelError, EngineError) as error:
            logger.error("the model can't be served: %s", error)
            board.refuse(str(error), await deployed_at)
            raise error from None  # a chain of causes would bury its sentence in `serve status`
        except Exception as error:
            board.report(LoadStage("failed", error=f"loading the model failed with {type(error).__name__}: {error}"))
            raise
        self._fingerprint = card.fingerprint
        board.publish(card)
        self._ingresses = IngressLiveness()
        self._channels = TokenChannels()
        if (host := await asyncio.to_thread(_channel_host)) is not None:
            await self._channels.listen(host)
            self._engine.watch_load(self._channels.tell)
        self._metrics = asyncio.create_task(self._report_metrics(RayMetrics()))

    def _start(
        self, config: AppConfig, report: Reporter, before_isolated: Callable[[GenerationRequest], None]
    ) -> tuple[Engine, ModelCard]:
        """All that takes long, on a thread of its own. Raises `ModelError` and `EngineError`."""
        report(LoadStage("starting torch"))
        # Imported here: these imports take seconds, and the process that runs `app.build` does not need them.
        import torch

        from serve_app.engine.cpu.threads import default_threads
        from serve_app.engine.engine import Engine
        from serve_app.grammar import start_loading
        from serve_app.models.cache import cache_directory
        from serve_app.models.loader import load
        from serve_app.models.source import resolve

        # The engine's thread computes with `threads`; a second pool beside it would slow both (see `Engine`).
        torch.set_num_threads(1)
        resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        cache = cache_directory(config.cache_dir)
        files = resolve(config.model, cache, progress=report)
        vocabulary = start_loading(files.tokenizer_folder, trust_remote_code=config.model.trust_remote_code)
        loaded = load(files, config.model, has_gpu=resources.get("GPU", 0) > 0, progress=report)
        replicas = config.model_server
        only_replica = replicas.autoscaling is None and replicas.num_replicas in (None, 1)
        given_cpus = resources.get("CPU", 1)
        threads = config.engine.threads or default_threads(given_cpus=given_cpus, only_replica=only_replica)
        engine = Engine(
            loaded.model,
            config.engine.model_copy(update={"threads": threads, "gpu_memory_fraction": config.gpu_memory_fraction}),
            context_tokens=loaded.context_tokens,
            fingerprint=loaded.fingerprint,
            dtype=loaded.dtype,
            on_stage=report,
            before_isolated=before_isolated,
            kernel_cache=cache / "kernels",
            vocabulary=vocabulary,
        )
        freeze()
        return engine, _card(loaded, engine)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Reply, None]:
        """The replies of one attempt; see `generation.replica.ReplicaClient.open`."""
        with self._ingresses.waiting(request.ingress_id):
            async with (
                aclosing(self._engine.generate(request)) as replies,
                aclosing(send(request, replies, self._channels, self._ingresses.gone)) as by_call,
            ):
                async for reply in by_call:
                    yield reply

    def record_replica_metadata(self) -> dict[str, str]:
        """Called by Serve, which passes the result to every router. A stream is continued only with its own weights."""
        return {
            FINGERPRINT_KEY: self._fingerprint,
            NUMERICS_KEY: self._engine.capacity.numerics_id,
            CHANNEL_KEY: str(self._channels.address or ""),
        }

    async def stats(self) -> EngineStats:
        """What the engine is doing, for operators and tests."""
        return self._engine.stats()

    async def check_health(self) -> None:
        """Raise when the engine is dead or hangs, so that Serve replaces this replica. A long prompt is no hang."""
        health = self._engine.health()
        if not health.alive:
            raise RuntimeError(health.error or "the engine's thread has ended")
        if health.step_running_s > STALL_LIMIT_S:
            raise RuntimeError(f"an engine step has been running for {health.step_running_s:.0f} s")

    async def _report_metrics(self, metrics: MetricsSink) -> None:
        told: dict[tuple[Metric, str], float] = {}
        while True:
            stats = self._engine.stats()
            for metric, phase, total in _totals(stats):
                tags = {"phase": phase} if phase else NO_TAGS
                metrics.count(metric, total - told.get((metric, phase), 0), tags)
                told[metric, phase] = total
            metrics.gauge(RUNNING, stats.running)
            metrics.gauge(WAITING, stats.waiting)
            metrics.gauge(CACHE_USE, stats.used_pages / stats.total_pages)
            await asyncio.sleep(METRICS_PERIOD_S)

    def __del__(self) -> None:
        """Called by Serve when the replica's streams have finished, or their time is over."""
        if hasattr(self, "_metrics"):
            self._metrics.cancel()
            self._engine.stop()


def _totals(stats: EngineStats) -> tuple[tuple[Metric, str, float], ...]:
    """(counter, phase or "", value since the start)."""
    counters = stats.counters
    return (
        (DRAFTED_TOKENS, "", counters.drafted_tokens),
        (ACCEPTED_TOKENS, "", counters.accepted_tokens),
        (PREEMPTIONS, "", stats.preemptions),
        (STEPS, "prefill", counters.prefill_steps),
        (STEPS, "decode", counters.steps - counters.prefill_steps),
        (STEP_TIME_S, "prefill", counters.prefill_step_s),
        (STEP_TIME_S, "decode", counters.step_s - counters.prefill_step_s),
    )


def _channel_host() -> str | None:
    """The address for token channels; None with Ray's TLS, because channels are not encrypted. Blocks for a call."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None
    if sum(node["Alive"] for node in ray.nodes()) == 1:  # type: ignore[no-untyped-call]
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _card(loaded: LoadedModel, engine: Engine) -> ModelCard:
    capacity = engine.capacity
    return ModelCard(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        context_tokens=capacity.context_tokens,
        kv_capacity_tokens=capacity.kv_capacity_tokens,
        vocab_size=loaded.model.config.get_text_config().vocab_size,
        weights_bytes=loaded.weights_bytes,
        kv_cache_bytes=capacity.kv_cache_bytes,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        attention_backend=capacity.attention_backend,
        batch_invariant=capacity.batch_invariant,
        notes=(*loaded.notes, *capacity.notes),
    )
