"""What callers use, counted where all ingress replicas see it: in one detached actor, if there may be several.

Promises exact counts over all ingress replicas, that the counts of a day outlive redeploys, and that the actor's errors
reach callers as `QuotaUnavailable`. When the actor dies, its counts are gone and begin anew.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.access.memory_quotas import MemoryQuotas, MemoryQuotaStore
from serve_app.access.quotas import LEASE_S, Message, QuotaStore, QuotaUnavailable, decode, encode_answers
from serve_app.access.shared_quotas import SharedQuotas
from serve_app.access.windows import DAY_S
from serve_app.config import AppConfig
from serve_app.models.model_error import ModelError

NAMESPACE = "serve_app"
VERSION = 1
"""Version of the messages. An actor outlives redeploys, so each version has its own."""
IDLE_EXIT_S = 2.0 * DAY_S
"""The actor ends after this long without a message, because `serve shutdown` does not end it. By then no use counts."""
CALL_TIMEOUT_S = 1.0
"""Requests wait for the answer."""
START_TIMEOUT_S = 60.0
"""For the first call, which starts the actor: a process and its imports, 1 to 3 s on the 2-core machine."""


class QuotaActor:
    """The actor's class."""

    def __init__(self) -> None:
        self._quotas = MemoryQuotas(LEASE_S)
        self._called_at = time.monotonic()
        self._ending = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def perform(self, package: bytes) -> bytes:
        """The answers to a package of messages; see `SharedQuotas`."""
        self._called_at = time.monotonic()
        return encode_answers([self._quotas.perform(message) for message in decode(package)])

    async def _end_when_idle(self) -> None:
        while (idle_s := time.monotonic() - self._called_at) < IDLE_EXIT_S:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(IDLE_EXIT_S - idle_s)
        ray.kill(ray.get_runtime_context().current_actor)


class ActorCarrier:
    """Carries packages to the actor of one application."""

    def __init__(self, app_name: str) -> None:
        self._name = f"limits of {app_name}, version {VERSION}"
        self._actor: Any = None

    async def carry(self, package: bytes, messages: list[Message]) -> bytes:
        """See `SharedQuotas`. Starts the actor when there is none."""
        try:
            for last in (False, True):
                starts = self._actor is None
                if starts:
                    self._actor = await asyncio.to_thread(self._connect)
                try:
                    async with asyncio.timeout(START_TIMEOUT_S if starts else CALL_TIMEOUT_S):
                        answers: bytes = await self._actor.perform.remote(package)
                        return answers
                except RayError:
                    # The actor has died, perhaps long ago. Every message may be repeated, also to a new actor.
                    self._actor = None
                    if last:
                        raise
        except (RayError, TimeoutError, ValueError) as error:
            raise QuotaUnavailable(f"the actor: {type(error).__name__}") from error
        raise AssertionError("unreachable")

    async def aclose(self) -> None:
        """Does nothing: the actor outlives this process."""

    def _connect(self) -> Any:
        """On a thread: the actor, started if there is none."""
        options: dict[str, Any] = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
        return ray.remote(QuotaActor).options(name=self._name, namespace=NAMESPACE, **options).remote()


def open_quotas(config: AppConfig, app_name: str) -> QuotaStore:
    """Where an ingress replica counts what callers use: in Redis if the streams are there, in its own memory if it is
    the only one, otherwise in the actor.

    Raises `ModelError` when Redis is configured and its package is not installed, and for an invalid URL.
    """
    if config.streams.store == "ray":
        if not config.ingress.may_be_several:
            return MemoryQuotaStore()
        carrier = ActorCarrier(app_name)
        return SharedQuotas(carrier.carry, carrier.aclose)
    try:
        from serve_app.access.redis_quotas import redis_quotas
    except ModuleNotFoundError as error:
        raise ModelError("streams.store is Redis, which needs: pip install 'serve_app[redis]'.") from error
    try:
        return redis_quotas(config.streams.store)
    except ValueError:  # its text may quote a part of the password
        raise ModelError("streams.store is not a valid URL of Redis.") from None
