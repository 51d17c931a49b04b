"""Whether the ingress processes that wait for a model replica's answers still live.

Serve tells a replica that a call was cancelled, but nothing when the calling process was killed: the replica would
compute its streams to their ends (measured: all of 1,000 tokens), and those streams, continued elsewhere, would wait
for the places. Promises that such work ends within about two seconds (P5). Knows no request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context

import ray

from serve_app.deployments.ray_internals import SERVE_NAMESPACE, SERVE_REPLICA_PREFIX

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
"""Interval of checks of the processes that wait. A check is one short call to the GCS for each of them."""


def own_name() -> str:
    """The actor name by which `IngressLiveness` watches this process; "" (not watched) outside a named actor."""
    return str(ray.get_runtime_context().get_actor_name() or "")


class IngressLiveness:
    """The ingress processes that wait for one replica, for the tasks of its event loop."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._found: set[str] = set()
        self._gone: set[str] = set()
        self._watching: asyncio.Task[None] | None = None

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """The process `name` waits for something as long as the block runs."""
        if not name:
            yield
            return
        self._waiting[name] += 1
        if self._watching is None or self._watching.done():
            # An empty context: the task belongs to no request, though one started it.
            self._watching = asyncio.create_task(self._watch(), name="ingress liveness", context=Context())
        try:
            yield
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
                self._found.discard(name)
                self._gone.discard(name)

    def gone(self, name: str) -> bool:
        """Whether that process has died."""
        return name in self._gone

    async def _watch(self) -> None:
        while self._waiting:
            # Not at once: most requests have ended by then, and a check takes CPU from their prefill.
            await asyncio.sleep(PERIOD_S)
            for name in [name for name in self._waiting if name not in self._gone]:
                lives = await asyncio.to_thread(_lives, name)
                if lives:
                    self._found.add(name)
                elif lives is None:
                    continue
                # A Serve replica is of this cluster: it has died if it isn't found. Another actor may be elsewhere: it
                # has died if it was found before.
                elif name in self._waiting and (name in self._found or name.startswith(SERVE_REPLICA_PREFIX)):
                    logger.warning("%s has died; its requests are cancelled", name)
                    self._gone.add(name)


def _lives(name: str) -> bool | None:
    """Whether the actor lives; None if the GCS did not answer."""
    try:
        ray.get_actor(name, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    except Exception:  # the GCS does not answer: nothing is known, and it is asked again
        logger.exception("could not find out whether %s is alive", name)
        return None
    return True
