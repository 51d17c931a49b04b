"""Opens attempts on model replicas through a Serve handle, and turns Serve's errors into `Failure` and `ReplicaLost`.

Promises that no exception of Ray's reaches the caller, and that a closed attempt is cancelled on its replica. Knows no
text; `generation.attempts` keeps the output, the deadline and the limit of silence.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from msgspec.structs import replace
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.access.admission import MAX_WAIT_S
from serve_app.access.admission_metrics import AdmissionMetrics
from serve_app.access.entry import Entry
from serve_app.core import Failure, FailureCode, GenerationRequest, LoadStage, ModelCard, Reply, TokenBatch
from serve_app.deployments.dispatch.attempt_metrics import AttemptMetrics
from serve_app.deployments.dispatch.channel_reader import ChannelReader
from serve_app.deployments.dispatch.directory import Attempt, replica_directory
from serve_app.deployments.dispatch.inbox import Inbox
from serve_app.deployments.dispatch.liveness import own_name
from serve_app.deployments.dispatch.poison import PoisonNotes
from serve_app.deployments.ray_internals import call_detached, cancel
from serve_app.deployments.status.readiness import Readiness
from serve_app.generation.replica import WAITING, ReplicaLost, Waiting
from serve_app.observability.metrics import MetricsSink

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""How often an attempt without a replica yields an empty batch, as `ReplicaClient.open` requires."""
_SHORTEST_PAUSE_S = 0.001
"""So that a request that may wait no longer is refused, and not asked about again and again."""
SILENCE_S = 4 * HEARTBEAT_S
"""A replica sends a reply to each attempt every second. If an attempt is given up after this long without a reply, its
replica counts as frozen or cut off, and gets no requests for a while."""
MAX_DEATHS = 2
"""An attempt is lost after this many replicas died while it was on its way to them."""
RETRY_AFTER_S = 1.0
"""What a refused client is told to wait when Serve names no time."""
_OUT_OF_ORDER = {FailureCode.REPLICA_LOST: True, FailureCode.NOT_READY: False}
"""Failure code of a replica that can compute nothing more -> whether the replica had taken the request."""


class RayReplicaClient:
    """A `generation.replica.ReplicaClient` over the model server's deployment handle."""

    def __init__(
        self, model_server: DeploymentHandle[Any], readiness: Readiness, max_wait_s: float = MAX_WAIT_S
    ) -> None:
        """`max_wait_s`: see `AdmissionConfig`."""
        self._generate = model_server.options(method_name="generate", stream=True)
        self._readiness = readiness
        self._directory = replica_directory(model_server.app_name, model_server.deployment_name)
        self._admission = self._directory.admission
        self._admission.max_wait_s = max_wait_s
        self._of_waiting = AdmissionMetrics(self._admission)
        self._of_attempts = AttemptMetrics()
        self._poison = PoisonNotes(model_server.app_name)
        self._ingress_id = own_name()
        self._channels = ChannelReader(self._directory.channel, self._ingress_id, self._admission.loaded)
        self._numbers = itertools.count(1)
        """Numbers of attempts."""
        self._reading: set[asyncio.Task[None]] = set()
        self._connects = False

    async def model(self) -> ModelCard | LoadStage:
        """The card of the model, or how far the first replica is; never waits for a replica."""
        return await self._readiness.model()

    def refusal(self, tenant: str, weight: float, remaining_s: float) -> Failure | None:
        """The refusal that a new request would get now, if any; see `Admission`."""
        return self._admission.refusal(tenant, weight, remaining_s)

    def report(self, metrics: MetricsSink) -> None:
        """Tell the metrics of those that wait, and how attempts went."""
        self._of_waiting.report(metrics)
        self._of_attempts.report(metrics)

    async def open(self, request: GenerationRequest) -> AsyncGenerator[Reply | Waiting, None]:
        """Start one attempt and yield its replies; see `ReplicaClient.open`.

        While all replicas are full it yields `WAITING`, and a failure once a new request has waited too long; or only
        that, if it would wait too long. While there is no replica (the last one died, or a deployment that was scaled
        to zero wakes for it), and for a request that was accepted before, it yields empty batches, for as long as the
        caller wants to wait. Once a replica has been given the request, it yields only the replica's replies. Raises
        `ReplicaLost` when the replica is stopping and another one can continue the stream.
        """
        self._connect()
        request = replace(request, ingress_id=self._ingress_id, attempt=next(self._numbers))
        entry = self._admission.enter(request)
        if isinstance(entry, Failure):
            yield entry
            return
        last: TokenBatch | None = None
        with (
            self._admission.keeping(entry),
            self._directory.track(request) as attempt,
            self._channels.inbox(attempt) as inbox,
        ):
            response = call_detached(lambda: self._generate.remote(request))
            reading = asyncio.create_task(_read(response, inbox), name=f"attempt {request.attempt}")
            self._reading.add(reading)
            reading.add_done_callback(partial(self._read_to_the_end, inbox))
            finished = False
            try:
                async with aclosing(self._replies(attempt, entry, inbox, reading)) as replies:
                    async for reply in replies:
                        if isinstance(reply, TokenBatch):
                            if reply.stats is not None and reply.first_index == len(request.output_token_ids):
                                self._of_attempts.begun(reply.stats)
                            last = reply
                            finished = reply.finish_reason is not None
                        elif isinstance(reply, Failure):
                            finished = attempt.replica is not None
                        yield reply
            finally:
                self._of_attempts.ended(entry)
                if last is not None:
                    entry.new_tokens = last.first_index + len(last.token_ids) - len(request.output_token_ids)
                # A call whose last reply came through a channel is about to end by itself.
                if not (finished or reading.done()):
                    reading.cancel()
                    cancel(response)
                    self._directory.forget(attempt)  # first: the router cancels a call that it gets after this
                    if attempt.call is not None:
                        cancel(attempt.call)
                if request.isolated and attempt.replica is not None:
                    # On a thread, and not awaited: whoever closes this generator may have been cancelled.
                    forget = partial(self._poison.forget, attempt.replica, request)
                    asyncio.get_running_loop().run_in_executor(None, forget)

    async def _replies(
        self, attempt: Attempt, entry: Entry, inbox: Inbox, reading: asyncio.Task[None]
    ) -> AsyncGenerator[Reply | Waiting, None]:
        """The replies of one attempt, up to its last one. Raises `ReplicaLost`."""
        ended = over = False
        quiet = 0
        """Heartbeats in a row that did not come. A clock would also count time in which this process stood still."""
        try:
            while not ended:
                reply = await inbox.take(HEARTBEAT_S if attempt.replica is not None else self._pause_s(entry))
                quiet = quiet + 1 if reply is None and attempt.replica is not None else 0
                if attempt.begun is not None and (attempt.replica is None or attempt.begun != attempt.sendings):
                    # A channel may bring tokens before Serve knows that the replica has accepted the request. If the
                    # replica then dies, Serve sends the request to another one, whose tokens may be another text.
                    raise await self._lost("another replica had already begun it", attempt, taken=True)
                if reply is not None:
                    self._directory.heard(attempt, tokens=isinstance(reply, TokenBatch) and bool(reply.token_ids))
                    ended = isinstance(reply, Failure) or reply.finish_reason is not None
                    if isinstance(reply, Failure) and reply.code in _OUT_OF_ORDER:
                        self._directory.out_of_order(attempt)
                        raise await self._lost(reply.message, attempt, taken=_OUT_OF_ORDER[reply.code])
                    yield reply
                elif inbox.broken:
                    broken, inbox.broken = inbox.broken, set()
                    if attempt.replica in broken:
                        raise await self._lost("its channel broke", attempt)
                elif attempt.deaths >= MAX_DEATHS and not attempt.taken:
                    # Serve would send the request to one replica after the other, and it may be what kills them.
                    reason = f"{attempt.deaths} replicas died before they accepted it"
                    raise await self._lost(reason, attempt, taken=True)
                elif reading.done() and (over or _broke(reading)):
                    ended = True
                    yield await self._last_word(attempt, reading)
                elif reading.done():
                    over = True  # its last reply may still come through a channel, within one heartbeat
                elif attempt.replica is None:
                    word = self._while_waiting(entry)
                    ended = isinstance(word, Failure)
                    yield word
                if not ended and self._directory.should_leave(attempt):
                    self._of_attempts.moved()
                    raise ReplicaLost(f"replica {attempt.replica} is leaving and another goes on", taken=False)
        finally:
            # When an attempt is given up, the heartbeat that was due next counts as missed too.
            here = attempt.replica
            silent = not ended and (quiet + 1) * HEARTBEAT_S >= SILENCE_S
            if silent and here is not None and self._directory.fell_silent(here, SILENCE_S):
                self._channels.drop(here)

    def _pause_s(self, entry: Entry) -> float:
        """How long an attempt without a replica waits before there is something to be said."""
        if not self._admission.refusable(entry):
            return HEARTBEAT_S
        return max(_SHORTEST_PAUSE_S, min(HEARTBEAT_S, self._admission.patience_s(entry)))

    def _while_waiting(self, entry: Entry) -> Reply | Waiting:
        """What an attempt without a replica is told."""
        if (failure := self._admission.late(entry)) is not None:
            return failure
        if self._admission.refusable(entry):
            return WAITING
        return TokenBatch(first_index=0 if entry.request is None else len(entry.request.output_token_ids))

    async def _last_word(self, attempt: Attempt, reading: asyncio.Task[None]) -> Failure:
        """The failure to report if Serve's call ended before a last batch. Raises `ReplicaLost` if there is none."""
        if reading.cancelled():
            raise await self._lost("the replica cancelled the attempt", attempt)
        error = reading.exception()
        if error is None:
            raise await self._lost("the replica's stream ended without a last batch", attempt)
        failure = _refusal(error, attempt.request)
        if failure is None:
            raise await self._lost(type(error).__name__, attempt) from error
        return failure

    def _connect(self) -> None:
        """Open channels to all live replicas, now and whenever they change."""
        if not self._connects:
            self._connects = True
            loop = asyncio.get_running_loop()
            self._directory.subscribe(lambda: loop.call_soon_threadsafe(self._connect))
        self._channels.connect(self._directory.live)

    def _read_to_the_end(self, inbox: Inbox, reading: asyncio.Task[None]) -> None:
        self._reading.discard(reading)
        if _broke(reading):
            inbox.fail()

    async def _lost(self, reason: str, attempt: Attempt, *, taken: bool | None = None) -> ReplicaLost:
        """The exception for a lost attempt. `taken` None: taken if the attempt was at a replica."""
        self._of_attempts.lost()
        self._readiness.doubt()
        implicated = (
            attempt.request.isolated
            and attempt.replica is not None
            and await asyncio.to_thread(self._poison.names, attempt.replica, attempt.request)
        )
        taken = attempt.replica is not None if taken is None else taken
        return ReplicaLost(f"replica {attempt.replica}: {reason}", taken=taken, implicated=implicated)


async def _read(response: DeploymentResponseGenerator[Reply], inbox: Inbox) -> None:
    """Read eagerly: Serve drops what was delivered but not read when a replica dies."""
    async for reply in response:
        inbox.put_by_call(reply)
        if isinstance(reply, Failure) or reply.finish_reason is not None:
            return  # the last reply: after it there is nothing left to cancel


def _broke(reading: asyncio.Task[None]) -> bool:
    """Whether the call failed. Reading its exception also keeps asyncio from reporting it."""
    return reading.cancelled() or reading.exception() is not None


def _refusal(error: BaseException, request: GenerationRequest) -> Failure | None:
    """The failure to report for an exception of the attempt; None when another replica can continue it."""
    if isinstance(error, BackPressureError):
        message = "The service is at its limit of waiting requests; try again in a moment."
        return Failure(FailureCode.OVERLOADED, message, retry_after_s=error.retry_after_s or RETRY_AFTER_S)
    if isinstance(error, DeploymentUnavailableError):
        return Failure(FailureCode.NOT_READY, "The model could not be loaded; GET /ready says why.")
    if isinstance(error, RayTaskError) or not isinstance(error, RayError | RayServeException | grpc.RpcError | OSError):
        logger.error("request %s: the model replica raised an error", request.request_id, exc_info=error)
        message = "The model replica raised an error on this request. Its log has the details under the request's id."
        return Failure(FailureCode.ENGINE_FAILED, message)
    return None  # RayActorError and its like, RequestCancelledError, ReplicaUnavailableError, a broken connection
