"""The journals of resumable streams in Redis, for services whose streams outlive a Ray cluster.

Promises the rules of `memory_store`. Each call is one atomic script and uses Redis's clock. Errors reach callers as
`StoreUnavailable`, with the stream's id cut short.

On a Redis Cluster all keys share one hash tag and so are on one node, because one atomic script must count all journals
against the limits, and may drop any of them to make room. A script declares the keys of its journals and of the
counters. It does not declare those of journals that it drops, which are in the same slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serve_app.redis_scripts import FAILURES, RedisScripts
from serve_app.resume.journal_store import (
    Append,
    AppendResult,
    JournalLimits,
    JournalView,
    LeaseStatus,
    StoreUnavailable,
)
from serve_app.resume.stream_id import loggable

TIMEOUT_S = 5.0
POLL_S = 0.1
"""Seconds between two reads by a reader that waits. Owners write as often."""

_PREFIX = "{serve_app}:"
"""Of all keys. The braces are the hash tag: a cluster keeps all of them in one slot."""
_COMMON = ("journals", "sizes", "bytes", "tenants", "held")
"""Names of the keys that all journals of a store share. The scripts find a store's prefix in the first one."""

_PRELUDE = """
-- KEYS: what all journals share, then the two keys of each journal that the script is called for.
-- ARGV: 1 max journals, 2 max bytes, 3 expiry, 4 lease (ms), 5 stream id, then the script's own.
-- For each journal: a hash (owner, document, created, lease, read, finished, stop) and a list of records. For all: a
-- sorted set of ids by when they were last touched, a hash of their sizes, the sum of the sizes, a hash of the tenants
-- that keep them and one of the bytes that each tenant holds. For each tenant: a sorted set as that for all.
local P = string.sub(KEYS[1], 1, -1 - #'journals')
local ALL, SIZES, TOTAL, TENANTS, HELD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local max_journals, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local expiry, lease, id = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function head(i) return P .. 'journal:' .. i end
local function log(i) return P .. 'records:' .. i end
local function field(i, name) return redis.call('HGET', head(i), name) end
local function leased(i) return now < tonumber(field(i, 'lease') or 0) end
-- Journals of versions without tenants have none of their own, and no set.
local function tenant(i) return redis.call('HGET', TENANTS, i) or '' end
local function kept_by(t) return P .. 'tenant:' .. t end
local function grow(i, size)
  redis.call('HINCRBY', SIZES, i, size)
  redis.call('INCRBY', TOTAL, size)
  redis.call('HINCRBY', HELD, tenant(i), size)
end
local function drop(i)
  local t = tenant(i)
  grow(i, 0 - (redis.call('HGET', SIZES, i) or 0))  -- a negated 0 would be -0, which is no integer for Redis
  redis.call('HDEL', SIZES, i)
  redis.call('HDEL', TENANTS, i)
  redis.call('ZREM', ALL, i)
  redis.call('ZREM', kept_by(t), i)
  if redis.call('EXISTS', kept_by(t)) == 0 then redis.call('HDEL', HELD, t) end
  redis.call('DEL', head(i), log(i))
end
local function touch(i)
  local t = kept_by(tenant(i))
  redis.call('ZADD', ALL, now, i)
  redis.call('ZADD', t, now, i)
  for _, key in ipairs({ALL, SIZES, TOTAL, TENANTS, HELD, t, head(i), log(i)}) do
    redis.call('PEXPIRE', key, 2 * expiry)
  end
end
-- Tenants by the larger of their shares of the bytes and of the number, the largest first
local function by_share()
  local all, shares = {}, {}
  local held = redis.call('HGETALL', HELD)
  for n = 1, #held, 2 do
    table.insert(all, held[n])
    shares[held[n]] = math.max(held[n + 1] / max_bytes, redis.call('ZCARD', kept_by(held[n])) / max_journals)
  end
  table.sort(all, function(one, other) return shares[one] > shares[other] end)
  return all
end
local function oldest_unowned(set)
  for _, other in ipairs(redis.call('ZRANGE', set, 0, -1)) do
    if not leased(other) then return other end
  end
end
local function make_room(size, journals)
  local function fits()
    return tonumber(redis.call('GET', TOTAL) or 0) + size <= max_bytes
      and redis.call('ZCARD', ALL) + journals <= max_journals
  end
  while not fits() do
    local found
    for _, t in ipairs(by_share()) do
      found = found or oldest_unowned(kept_by(t))
    end
    found = found or oldest_unowned(ALL)
    if not found then return false end
    drop(found)
  end
  return true
end
for _, old in ipairs(redis.call('ZRANGEBYSCORE', ALL, '-inf', now - expiry)) do drop(old) end
"""

_CREATE = """
-- 6 owner, 7 document, 8 tenant
local owner = field(id, 'owner')
if owner and owner ~= ARGV[6] then return 'lost' end
if owner then drop(id) end
if not make_room(#ARGV[7], 1) then return 'full' end
redis.call('HSET', head(id), 'owner', ARGV[6], 'document', ARGV[7], 'created', now, 'lease', now + lease)
redis.call('HSET', TENANTS, id, ARGV[8])
grow(id, #ARGV[7])
touch(id)
return 'held'
"""

_APPEND = """
-- From 5 on, for each journal: id, owner, position, then, number of records, records.
-- Returns for each the hold, ms since the journal was read or -1, and whether the owner is to stop
local function append(id, by, position, after, first, last)
  local owner = field(id, 'owner')
  if owner and owner ~= by then return {'lost', -1, 0} end
  local count = redis.call('LLEN', log(id))
  if not owner or position > count then
    drop(id)
    return {'gone', -1, 0}
  end
  if after == 'drop' then
    drop(id)
    return {'held', -1, 0}
  end
  redis.call('HSET', head(id), 'lease', now + lease)
  local size = 0
  for n = first + count - position, last do size = size + #ARGV[n] end
  if not make_room(size, 0) then
    drop(id)
    return {'full', -1, 0}
  end
  for n = first + count - position, last do redis.call('RPUSH', log(id), ARGV[n]) end
  grow(id, size)
  touch(id)
  if after ~= 'hold' then redis.call('HSET', head(id), 'lease', now) end
  if after == 'finish' then redis.call('HSET', head(id), 'finished', 1) end
  local read = field(id, 'read')
  return {'held', read and now - tonumber(read) or -1, field(id, 'stop') and 1 or 0}
end
local answers, n = {}, 5
while n <= #ARGV do
  local records = tonumber(ARGV[n + 4])
  table.insert(answers, append(ARGV[n], ARGV[n + 1], tonumber(ARGV[n + 2]), ARGV[n + 3], n + 5, n + 4 + records))
  n = n + 5 + records
end
return answers
"""

_READ = """
-- 6 position. Returns document, finished, leased, age in ms, records
local owner = field(id, 'owner')
if not owner then return false end
redis.call('HSET', head(id), 'read', now)
touch(id)
local position = tonumber(ARGV[6])
local document = position == 0 and field(id, 'document') or ''
local finished = field(id, 'finished') and 1 or 0
local records = redis.call('LRANGE', log(id), position, -1)
return {document, finished, leased(id) and 1 or 0, now - tonumber(field(id, 'created')), records}
"""

_ACQUIRE = """
-- 6 owner
if not field(id, 'owner') or field(id, 'finished') or leased(id) then return 0 end
redis.call('HSET', head(id), 'owner', ARGV[6], 'lease', now + lease)
touch(id)
return 1
"""

_ASK_TO_STOP = """
if not field(id, 'owner') then return 0 end
redis.call('HSET', head(id), 'stop', 1)
return 1
"""

_ERASE = """
if not field(id, 'owner') then return 0 end
grow(id, 0 - (redis.call('HGET', SIZES, id) or 0))
redis.call('DEL', head(id), log(id))
redis.call('HSET', head(id), 'owner', '', 'document', '', 'created', now, 'lease', now, 'finished', 1)
touch(id)
return 1
"""

_SIZE = """
return {redis.call('ZCARD', ALL), tonumber(redis.call('GET', TOTAL) or 0)}
"""


class RedisJournalStore:
    """A `resume.journal_store.JournalStore` over one Redis database, or over a Redis Cluster."""

    def __init__(self, url: str, limits: JournalLimits, kind: str = "") -> None:
        """`url`: `redis://`, `rediss://` or `unix://`. Raises ValueError for another. Connects when first used.

        Stores of one database with different `kind`s share nothing.
        """
        self._prefix = f"{_PREFIX}{kind}:" if kind else _PREFIX
        self._scripts = RedisScripts(url, TIMEOUT_S)
        self._limits = [
            limits.max_journals,
            limits.max_bytes,
            int(limits.expiry_s * 1000),
            int(limits.lease_s * 1000),
        ]

    async def create(self, stream_id: str, owner: str, document: bytes, tenant: str = "") -> LeaseStatus:
        """See `JournalStore`."""
        answer: bytes = await self._run(_CREATE, [stream_id], [stream_id, owner, document, tenant])
        return LeaseStatus(answer.decode())

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """See `JournalStore`. One round trip."""
        if not appends:
            return []
        arguments: list[Any] = []
        for append in appends:
            arguments += [append.stream_id, append.owner, append.position, str(append.action), len(append.records)]
            arguments += append.records
        stream_ids = [append.stream_id for append in appends]
        answers: list[tuple[bytes, int, int]] = await self._run(_APPEND, stream_ids, arguments)
        return [
            AppendResult(LeaseStatus(lease.decode()), None if read_ms < 0 else read_ms / 1000, bool(stop))
            for lease, read_ms, stop in answers
        ]

    async def read(self, stream_id: str, position: int, wait_s: float = 0.0) -> JournalView | None:
        """See `JournalStore`. Waits by polling."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            answer = await self._run(_READ, [stream_id], [stream_id, position])
            if answer is None:
                return None
            document, finished, leased, age_ms, records = answer
            left_s = deadline - loop.time()
            if records or finished or not leased or left_s <= 0:
                return JournalView(document, tuple(records), bool(finished), bool(leased), age_ms / 1000)
            await asyncio.sleep(min(POLL_S, left_s))

    async def acquire(self, stream_id: str, owner: str) -> bool:
        """See `JournalStore`."""
        return bool(await self._run(_ACQUIRE, [stream_id], [stream_id, owner]))

    async def ask_to_stop(self, stream_id: str) -> bool:
        """See `JournalStore`."""
        return bool(await self._run(_ASK_TO_STOP, [stream_id], [stream_id]))

    async def erase(self, stream_id: str) -> bool:
        """See `JournalStore`."""
        return bool(await self._run(_ERASE, [stream_id], [stream_id]))

    async def size(self) -> tuple[int, int]:
        """See `JournalStore`."""
        journals, size_bytes = await self._run(_SIZE, [], [""])
        return journals, size_bytes

    async def aclose(self) -> None:
        """Close the connections."""
        await self._scripts.aclose()

    async def _run(self, script: str, stream_ids: Sequence[str], arguments: Sequence[Any]) -> Any:
        """What the script answers. Raises `StoreUnavailable`."""
        script = _PRELUDE + script
        own = (f"{kind}:{id_}" for id_ in stream_ids for kind in ("journal", "records"))
        keys = [self._prefix + name for name in (*_COMMON, *own)]
        try:
            return await self._scripts.run(script, keys, [*self._limits, *arguments])
        except FAILURES as error:
            said = str(error) or type(error).__name__
            for stream_id in stream_ids:  # errors of Redis may quote the command that failed
                said = said.replace(stream_id, loggable(stream_id))
            raise StoreUnavailable(f"Redis: {said}") from None  # its traceback would show what was sent
