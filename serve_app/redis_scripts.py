"""Runs scripts on a Redis server or a Redis Cluster.

Promises that each script is one step, sent in full only when the server does not know it. Before its first script it
asks the server whether it is a cluster, whose nodes answer only for their own keys and redirect. Knows no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisClusterException, RedisError

FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
"""What `run` raises when Redis can't be reached or refuses. The texts may quote what was sent."""


class RedisScripts:
    """One client, for the scripts of one store."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`url`: `redis://`, `rediss://` or `unix://`. Raises ValueError for another. Connects when first used."""
        self._url = url
        self._options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            # A connection that Redis has closed fails only when it is used. Each script may be repeated.
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), retries=2),
        }
        self._single: Redis = Redis.from_url(url, **self._options)
        self._redis: Redis | RedisCluster | None = None
        """The client in use; None until it is known whether the server is a cluster."""

    async def run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """What the script answers. Raises one of `FAILURES`."""
        given = (len(keys), *keys, *arguments)
        redis: Any = await self.client()
        try:
            return await redis.evalsha(sha1(script.encode(), usedforsecurity=False).hexdigest(), *given)
        except NoScriptError:
            return await redis.eval(script, *given)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._single.aclose()
        if isinstance(self._redis, RedisCluster):
            await self._redis.aclose()

    async def client(self) -> Redis | RedisCluster:
        """The client, for one server or for a cluster."""
        if self._redis is None:
            try:
                info = await self._single.info("cluster")
                # Servers other than Redis that know no cluster may leave this field out.
                is_cluster = bool(info.get("cluster_enabled"))
            except NoPermissionError:  # the user may not call INFO; on a cluster it would need to
                is_cluster = False
            if self._redis is None:  # another call may have set it meanwhile
                self._redis = RedisCluster.from_url(self._url, **self._options) if is_cluster else self._single
        return self._redis
