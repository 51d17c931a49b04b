"""Counts what callers use in Redis, for services that have one.

Promises the rules of `memory_quotas`: one script performs a package of messages in one step, by Redis's clock. On a
Redis Cluster all keys share the hash tag of the service's other keys, and so are on one node.
"""

from __future__ import annotations

from collections.abc import Callable

from serve_app.access.quotas import LEASE_S, Ask, Message, QuotaUnavailable, Renew
from serve_app.access.shared_quotas import SharedQuotas
from serve_app.access.windows import DAY_S, MINUTE_S
from serve_app.redis_scripts import FAILURES, RedisScripts

TIMEOUT_S = 1.0
"""Requests wait for the answer."""
_PREFIX = "{serve_app}:quotas:"

_SCRIPT = f"""
-- KEYS: all that the messages name. ARGV: 1 prefix, 2 lease in ms, 3 time in seconds or '', 4 messages (see `quotas`).
-- For each subject: a hash of its counters, and a sorted set of the leases of its streams by when they expire, in ms.
-- For each lease: what it has counted. Its expiry is that of its key.
local P, LEASE_MS = ARGV[1], tonumber(ARGV[2])
local PERIODS = {{{MINUTE_S}, {MINUTE_S}, {DAY_S}}}
local LATER_S, STREAM_WAIT_S = 0.001, 1
local now = tonumber(ARGV[3])
if not now then
  local t = redis.call('TIME')
  now = t[1] + t[2] / 1000000
end
local now_ms = math.floor(now * 1000)
local function uses_key(subject) return P .. 'use:' .. subject end
local function streams_key(subject) return P .. 'streams:' .. subject end
local function lease_key(lease) return P .. 'lease:' .. lease end

-- The three windows of a subject, each as {{index, current, previous}}, begun anew where time has passed.
local function windows_of(subject)
  local kept = redis.call('HMGET', uses_key(subject), '1', '2', '3')
  local windows = {{}}
  for n, period in ipairs(PERIODS) do
    local w = kept[n] and cmsgpack.unpack(kept[n]) or {{0, 0, 0}}
    local index = math.floor(now / period)
    if index > w[1] then w = {{index, 0, index == w[1] + 1 and w[2] or 0}} end
    windows[n] = w
  end
  return windows
end
local function keep(subject, windows)
  local key = uses_key(subject)
  for n, w in ipairs(windows) do redis.call('HSET', key, n, cmsgpack.pack(w)) end
  redis.call('EXPIRE', key, 2 * PERIODS[3])
end
local function left_s(w, period) return math.min(period, math.max(0, (w[1] + 1) * period - now)) end
local function covers_s(previous, room, period)
  if previous == 0 then return period end
  return math.min(1, (room + 1) / previous) * period
end
local function wait_s(w, period, most, cost)
  local left, room = left_s(w, period), most - cost
  local wait
  if w[2] <= room then wait = left - covers_s(w[3], room - w[2], period)
  else wait = left + period - covers_s(w[2], room, period) end
  return math.max(0, wait) + LATER_S
end

local function ask(lease, demands, tokens, stream)
  local known = redis.call('EXISTS', lease_key(lease)) == 1
  local uses, there, refused = {{}}, {{}}, false
  for d, demand in ipairs(demands) do
    local windows = windows_of(demand[1])
    there[d] = windows
    for n, period in ipairs(PERIODS) do
      local most, w = demand[n + 1], windows[n]
      if most then
        local cost = known and 0 or n == 1 and 1 or tokens
        local used = math.floor(w[3] * left_s(w, period) / period) + w[2]
        local wait = cost > 0 and used + cost > most and wait_s(w, period, most, cost) or 0
        local reset = w[2] + cost > 0 and left_s(w, period) + period or w[3] > 0 and left_s(w, period) or 0
        refused = refused or wait > 0
        table.insert(uses, {{d - 1, n - 1, most, used, reset, wait}})
      end
    end
    if demand[5] then
      redis.call('ZREMRANGEBYSCORE', streams_key(demand[1]), '-inf', now_ms)
      local taken = redis.call('ZCARD', streams_key(demand[1]))
      local wait = stream and not known and taken >= demand[5] and STREAM_WAIT_S or 0
      refused = refused or wait > 0
      table.insert(uses, {{d - 1, 3, demand[5], taken, 0, wait}})
    end
  end
  if known or refused then return uses end
  local counted = {{}}
  for d, demand in ipairs(demands) do
    local windows = there[d]
    windows[1][2] = windows[1][2] + 1
    windows[2][2] = windows[2][2] + tokens
    windows[3][2] = windows[3][2] + tokens
    keep(demand[1], windows)
    if stream then
      redis.call('ZADD', streams_key(demand[1]), now_ms + LEASE_MS, lease)
      redis.call('PEXPIRE', streams_key(demand[1]), 2 * LEASE_MS)
      table.insert(counted, {{demand[1], windows[2][1], windows[3][1]}})
    end
  end
  if stream then redis.call('SET', lease_key(lease), cmsgpack.pack({{tokens, counted}}), 'PX', LEASE_MS) end
  return uses
end

local function give_back(w, amount, index)
  if index == w[1] then w[2] = math.max(0, w[2] - amount)
  elseif index == w[1] - 1 then w[3] = math.max(0, w[3] - amount) end
end
local function settle(lease, used)
  local kept = redis.call('GET', lease_key(lease))
  if not kept then return end
  redis.call('DEL', lease_key(lease))
  local tokens, counted = unpack(cmsgpack.unpack(kept))
  for _, where in ipairs(counted) do
    local windows = windows_of(where[1])
    give_back(windows[2], tokens - used, where[2])
    give_back(windows[3], tokens - used, where[3])
    keep(where[1], windows)
    redis.call('ZREM', streams_key(where[1]), lease)
  end
end

local function renew(leases, subjects)
  for _, lease in ipairs(leases) do
    if redis.call('PEXPIRE', lease_key(lease), LEASE_MS) == 1 then
      for _, subject in ipairs(subjects) do
        redis.call('ZADD', streams_key(subject), 'XX', now_ms + LEASE_MS, lease)
      end
    end
  end
  for _, subject in ipairs(subjects) do redis.call('PEXPIRE', streams_key(subject), 2 * LEASE_MS) end
end

local answers = {{}}
for n, message in ipairs(cmsgpack.unpack(ARGV[4])) do
  answers[n] = {{}}
  if message[1] == 'ask' then answers[n] = ask(message[2], message[3], message[4], message[5])
  elseif message[1] == 'settle' then settle(message[2], message[4])
  else renew(message[2], message[3]) end
end
return cmsgpack.pack(answers)
"""


class _RedisCarrier:
    """Carries packages to Redis."""

    def __init__(self, url: str, clock: Callable[[], float] | None, lease_s: float, timeout_s: float) -> None:
        self._scripts = RedisScripts(url, timeout_s)
        self._clock = clock
        self._lease_ms = int(lease_s * 1000)

    async def carry(self, package: bytes, messages: list[Message]) -> bytes:
        """See `SharedQuotas`."""
        now = "" if self._clock is None else repr(self._clock())
        arguments = [_PREFIX, self._lease_ms, now, package]
        try:
            answers: bytes = await self._scripts.run(_SCRIPT, _keys(messages), arguments)
        except FAILURES as error:
            raise QuotaUnavailable(f"Redis: {type(error).__name__}") from None  # its text may quote what was sent
        return answers

    async def aclose(self) -> None:
        """See `SharedQuotas`."""
        await self._scripts.aclose()


def redis_quotas(
    url: str,
    *,
    clock: Callable[[], float] | None = None,
    lease_s: float = LEASE_S,
    timeout_s: float = TIMEOUT_S,
) -> SharedQuotas:
    """A `QuotaStore` over one Redis database, or over a Redis Cluster. Connects when first used.

    `clock`: in seconds, instead of Redis's own. Raises ValueError for a URL that is none of Redis.
    """
    carrier = _RedisCarrier(url, clock, lease_s, timeout_s)
    return SharedQuotas(carrier.carry, carrier.aclose, lease_s)


def _keys(messages: list[Message]) -> list[str]:
    """All keys that the messages name."""
    keys: dict[str, None] = {}
    for message in messages:
        leases = message.leases if isinstance(message, Renew) else (message.lease,)
        subjects = tuple(each.subject for each in message.demands) if isinstance(message, Ask) else message.subjects
        keys |= dict.fromkeys(f"{_PREFIX}lease:{lease}" for lease in leases)
        keys |= dict.fromkeys(f"{_PREFIX}{kind}:{subject}" for subject in subjects for kind in ("use", "streams"))
    return list(keys)
