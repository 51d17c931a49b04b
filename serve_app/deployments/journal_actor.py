"""The journals of resumable streams in one detached actor: started when first needed, ended when long unneeded.

Promises that the journals outlive ingress replicas and redeploys (deployment actors don't), and that the actor's errors
reach callers as `StoreUnavailable`. When the actor dies, its journals are gone; their owners write them again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.config import AppConfig
from serve_app.generation.replica import ReplicaClient
from serve_app.models.model_error import ModelError
from serve_app.resume.context import ResumeSettings
from serve_app.resume.journal_store import (
    Append,
    AppendResult,
    JournalLimits,
    JournalStore,
    JournalView,
    LeaseStatus,
    StoreUnavailable,
)
from serve_app.resume.memory_store import MemoryJournalStore
from serve_app.resume.registry import ResumableStreams

NAMESPACE = "serve_app"
VERSION = 4
"""Version of the actor's methods and their arguments. An actor outlives redeploys, so each version has its own."""
MAX_CALLS = 10_000
"""Calls at a time. Each reader at an ingress other than the owner's is one waiting call."""
IDLE_EXIT_S = 3600.0
"""The actor ends after this long without a journal and a call, because `serve shutdown` does not end it."""
CALL_TIMEOUT_S = 5.0
_RESPONSE_GONE_S = 1.0
"""`ResumeSettings.gone_s` of responses: a client that asks for one that was deleted should not wait for long."""
START_TIMEOUT_S = 60.0
"""For a call that may have to start the actor: a process and its imports, 1 to 3 s on the 2-core machine."""


class JournalActor(MemoryJournalStore):
    """The actor's class. Calls of `size` and `acquire` do not keep an idle actor from ending."""

    def __init__(self, limits: JournalLimits) -> None:
        super().__init__(limits)
        self._called_at = time.monotonic()
        self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def configure(self, limits: JournalLimits) -> None:
        """Set the limits of the application's current config; the last call wins."""
        self.journals.limits = limits

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        """See `JournalStore`."""
        self._called_at = time.monotonic()
        return await super().create(stream_id, owner, document, tenant)

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """See `JournalStore`."""
        self._called_at = time.monotonic()
        return await super().append(appends)

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        """See `JournalStore`."""
        self._called_at = time.monotonic()
        return await super().read(stream_id, position, wait_s)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, self.journals.limits.expiry_s))
            self.journals.expire()
            if not len(self.journals) and time.monotonic() - self._called_at > IDLE_EXIT_S:
                ray.kill(ray.get_runtime_context().current_actor)


class RayJournalStore:
    """A `resume.journal_store.JournalStore` over the actor of one application."""

    def __init__(self, app_name: str, limits: JournalLimits, kind: str = "journals") -> None:
        """Each `kind` of journals has an actor of its own."""
        self._name = f"{kind} of {app_name}, version {VERSION}"
        self._limits = limits
        self._actor: Any = None

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        """See `JournalStore`. Starts the actor when there is none."""
        lease: LeaseStatus = await self._call(
            lambda actor: actor.create.remote(stream_id, owner, document, tenant), start=True
        )
        return lease

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """See `JournalStore`. Starts the actor when it has gone, so that owners can write their journals again."""
        answer: list[AppendResult] = await self._call(lambda actor: actor.append.remote(appends), start=True)
        return answer

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        """See `JournalStore`. No actor: no journals."""
        answer: JournalView | None = await self._call(
            lambda actor: actor.read.remote(stream_id, position, wait_s), start=False, wait_s=wait_s
        )
        return answer

    async def acquire(self, stream_id: str, owner: str) -> bool:
        """See `JournalStore`."""
        return bool(await self._call(lambda actor: actor.acquire.remote(stream_id, owner), start=False))

    async def ask_to_stop(self, stream_id: str) -> bool:
        """See `JournalStore`."""
        return bool(await self._call(lambda actor: actor.ask_to_stop.remote(stream_id), start=False))

    async def erase(self, stream_id: str) -> bool:
        """See `JournalStore`."""
        return bool(await self._call(lambda actor: actor.erase.remote(stream_id), start=False))

    async def size(self) -> tuple[int, int]:
        """See `JournalStore`."""
        answer: tuple[int, int] | None = await self._call(lambda actor: actor.size.remote(), start=False)
        return answer or (0, 0)

    async def aclose(self) -> None:
        """Does nothing: the actor outlives this process."""

    async def _call(self, call: Callable[[Any], Awaitable[Any]], *, start: bool, wait_s: float = 0.0) -> Any:
        """The actor's answer; None when there is no actor and `start` is false. Raises `StoreUnavailable`."""
        try:
            for last in (False, True):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(self._connect, start)
                    if self._actor is None:
                        return None
                try:
                    async with asyncio.timeout(CALL_TIMEOUT_S + wait_s):
                        return await call(self._actor)
                except RayError:
                    # The actor has died, perhaps long ago. Every call may be repeated, also on a new actor.
                    self._actor = None
                    if last:
                        raise
        except (RayError, TimeoutError, ValueError) as error:
            raise StoreUnavailable(f"the journal actor: {type(error).__name__}") from error

    def _connect(self, start: bool) -> Any:
        """On a thread: the actor, or None when there is none and it is not to be started."""
        if not start:
            try:
                return ray.get_actor(self._name, namespace=NAMESPACE)
            except ValueError:
                return None
        actor: Any = (
            ray.remote(JournalActor)
            .options(
                name=self._name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=MAX_CALLS,
            )
            .remote(self._limits)
        )
        ray.get(actor.configure.remote(self._limits), timeout=START_TIMEOUT_S)
        return actor


def open_streams(client: ReplicaClient, app_config: AppConfig, app_name: str) -> ResumableStreams:
    """The resumable streams of an ingress replica, with their journals where the config says.

    Raises `ModelError` when Redis is configured and its package is not installed, and for an invalid URL.
    """
    config = app_config.streams
    limits = JournalLimits(max_journals=config.max_streams, max_bytes=config.max_bytes, expiry_s=config.expiry_s)
    settings = ResumeSettings(
        config.grace_s,
        config.max_unattended,
        lease_s=limits.lease_s,
        max_event_bytes=config.max_bytes,
        max_stream_event_bytes=app_config.api.slow_reader_bytes,
    )
    return ResumableStreams(client, _open_store(config.store, app_name, limits, ""), settings)


def open_responses(client: ReplicaClient, app_config: AppConfig, app_name: str) -> ResumableStreams:
    """The kept responses of an ingress replica, in the same kind of store as its resumable streams.

    A response that its reader left is generated no further until somebody reads it again, unless it is in the
    background. Raises `ModelError` as `open_streams` does.
    """
    config = app_config.responses
    limits = JournalLimits(max_journals=config.max_responses, max_bytes=config.max_bytes, expiry_s=config.expiry_s)
    settings = ResumeSettings(
        grace_s=0.0,
        max_background=config.max_background,
        gone_s=_RESPONSE_GONE_S,
        lease_s=limits.lease_s,
        max_event_bytes=app_config.streams.max_bytes,
        max_stream_event_bytes=app_config.api.slow_reader_bytes,
    )
    return ResumableStreams(client, _open_store(app_config.streams.store, app_name, limits, "responses"), settings)


def _open_store(url: str, app_name: str, limits: JournalLimits, kind: str) -> JournalStore:
    """The store at this URL; each `kind` has its own journals and limits. Raises `ModelError`."""
    if url == "ray":
        return RayJournalStore(app_name, limits, kind or "journals")
    try:
        from serve_app.resume.redis_store import RedisJournalStore
    except ModuleNotFoundError as error:
        raise ModelError("streams.store is Redis, which needs: pip install 'serve_app[redis]'.") from error
    try:
        return RedisJournalStore(url, limits, kind)
    except ValueError:  # its text may quote a part of the password
        raise ModelError(
            "streams.store is not a valid URL: write redis://[user:password@]host:port/0, with special characters "
            "of the password percent-encoded."
        ) from None
