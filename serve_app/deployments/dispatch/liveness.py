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
"""Between two looks at the processes that wait for something: one short call to the GCS for each of them."""


def own_name() -> str:
    """This process as `IngressLiveness` knows it; "" outside of a named actor (a script), which nobody watches."""
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
            # It belongs to no request, whoever started it.
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
        """Whether that process waits no more, since it has died."""
        return name in self._gone

    async def _watch(self) -> None:
        while self._waiting:
            # Not at once: most have what they wait for by then, and a look takes CPU from their prefill.
            await asyncio.sleep(PERIOD_S)
            for name in [name for name in self._waiting if name not in self._gone]:
                lives = await asyncio.to_thread(_lives, name)
                if lives:
                    self._found.add(name)
                elif lives is None:
                    continue
                # A Serve replica is of this cluster: it has died if it isn't found. Any other, if it was found before.
                elif name in self._waiting and (name in self._found or name.startswith(SERVE_REPLICA_PREFIX)):
                    logger.warning("%s has died; its requests are cancelled", name)
                    self._gone.add(name)


def _lives(name: str) -> bool | None:
    """None when that could not be found out."""
    try:
        ray.get_actor(name, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    except Exception:  # the GCS does not answer: nothing is known, and it is asked again
        logger.exception("could not find out whether %s is alive", name)
        return None
    return True
