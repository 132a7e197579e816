"""Streams that can be resumed: what was asked, who serves it, and every token so far.

A stream is a hash `pdserve:{cluster}:stream:<tenant>/<request id>` (what was asked, its owner, its
end) and a list `…:stream-log:…` with one JSON entry for each delta, in order. A key of the caller's
own points at the request that it stands for. All of it expires; `…:stream-was:…` outlives it for a
day, so that expired can be told from unknown. Every write names the owner and is refused for any
other, so that a router that froze and wakes up cannot write into what another one has taken over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from cluster.errors import NotFound
from cluster.store.client import store_errors
from cluster.store.records import known_fields

REMEMBERED_SECONDS = 24 * 3600
MAX_STREAMS = 20_000

# KEYS: head, log, was, index[, idempotency key]. ARGV: request id, asked, fingerprint, owner,
# ttl ms, remembered ms, now, cap, prefix of heads, prefix of logs, name, mark, tenant. The request
# that holds the key or the id, and whether by this very claim, whose first answer was lost then.
# The oldest beyond the cap go, at most 64 a call. A stream that failed may begin again, and a key
# whose stream failed or is gone is free.
_CLAIM = """
local function holds(head)
  local stream = redis.call('HMGET', head, 'end', 'mark')
  if not stream[1] or string.sub(stream[1], 1, 9) == '{"error":' then return nil end
  return stream[2] == ARGV[12] and 1 or 0
end
local held = KEYS[5] and redis.call('GET', KEYS[5])
if held then
  local mine = holds(ARGV[9] .. ARGV[13] .. '/' .. held)
  if mine then return {held, mine} end
end
local mine = holds(KEYS[1])
if mine then return {mine == 1 and ARGV[1] or '', mine} end
redis.call('HSET', KEYS[1], 'asked', ARGV[2], 'fingerprint', ARGV[3], 'owner', ARGV[4], 'end', '',
  'mark', ARGV[12])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[3], '1', 'PX', ARGV[6])
if KEYS[5] then redis.call('SET', KEYS[5], ARGV[1], 'PX', ARGV[5]) end
redis.call('ZADD', KEYS[4], ARGV[7], ARGV[11])
redis.call('PEXPIRE', KEYS[4], ARGV[6])
local over = redis.call('ZCARD', KEYS[4]) - tonumber(ARGV[8])
if over > 0 then
  local old = redis.call('ZPOPMIN', KEYS[4], math.min(over, 64))
  for i = 1, #old, 2 do redis.call('DEL', ARGV[9] .. old[i], ARGV[10] .. old[i]) end
end
return {ARGV[1], 1}
"""

# KEYS: head, log. ARGV: owner, entries before these, entries. -1: another owner, -2: it is gone.
# Entries that are there already came with a call whose answer was lost.
_APPEND = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if not owner then return -2 end
if owner ~= ARGV[1] then return -1 end
local known = redis.call('LLEN', KEYS[2])
if known < tonumber(ARGV[2]) then return -1 end
for i = 3 + known - tonumber(ARGV[2]), #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[2], math.max(1, redis.call('PTTL', KEYS[1])))
return redis.call('LLEN', KEYS[2])
"""

# KEYS: head, log[, idempotency key]. ARGV: owner, end, ttl ms, request id.
_FINISH = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'end', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
if KEYS[3] and redis.call('GET', KEYS[3]) == ARGV[4] then
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
return 1
"""

# KEYS: head, log, was[, idempotency key]. ARGV: owner, mark.
_FORGET = """
local head = redis.call('HMGET', KEYS[1], 'owner', 'mark')
if head[1] ~= ARGV[1] or head[2] ~= ARGV[2] then return 0 end
redis.call('DEL', unpack(KEYS))
return 1
"""

# KEYS: head, record of the router that owns it. ARGV: its owner, that router's incarnation, the
# next owner, its mark: with it the answer is the same however often it was lost.
_TAKE_OVER = """
local head = redis.call('HMGET', KEYS[1], 'owner', 'end', 'mark')
if head[2] ~= '' then return 0 end
if head[1] == ARGV[3] and head[3] == ARGV[4] then return 1 end
if head[1] ~= ARGV[1] then return 0 end
local record = redis.call('GET', KEYS[2])
if record and cjson.decode(record).incarnation == ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[3], 'mark', ARGV[4])
return 1
"""

# KEYS: head. ARGV: owner.
_ABANDON = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'owner', '')
return 1
"""


@dataclass(frozen=True)
class StreamHead:
    """A stream without its tokens.

    Attributes:
        asked: JSON of what was asked, as its router wrote it.
        fingerprint: digest of it; equal for a repetition of the same request.
        owner: `<router id> <incarnation>` of the router that serves it; empty: none does.
        end: JSON of how it ended; empty while it runs.
        mark: of the claim that began it, or of the last taking over.
    """

    asked: str
    fingerprint: str
    owner: str
    end: str
    mark: str = ""


@dataclass(frozen=True)
class Holder:
    """Who has an idempotency key or, without one, a request id.

    Attributes:
        request_id: the holder's; empty if the claimed id is that of another request that is kept.
        mine: the claim has won: whoever made it is to run the request.
    """

    request_id: str
    mine: bool


@dataclass(frozen=True)
class StreamName:
    """Which stream: of which tenant, and under which idempotency key, if it has one."""

    tenant: str
    request_id: str
    key: str = ""

    @property
    def id(self) -> str:
        return f"{self.tenant}/{self.request_id}"


class Streams:
    """The streams of one cluster. Every method raises `Unavailable` while the store is out."""

    def __init__(self, client: Redis, cluster_name: str, max_streams: int = MAX_STREAMS) -> None:
        self._client: Any = client
        self._cluster = f"pdserve:{{{cluster_name}}}"
        self._max_streams = max_streams
        self._claim = client.register_script(_CLAIM)
        self._append = client.register_script(_APPEND)
        self._finish = client.register_script(_FINISH)
        self._forget = client.register_script(_FORGET)
        self._take_over = client.register_script(_TAKE_OVER)
        self._abandon = client.register_script(_ABANDON)

    async def claim(
        self,
        name: StreamName,
        asked: str,
        fingerprint: str,
        owner: str,
        mark: str,
        ttl_seconds: float,
        now_wall: float,
    ) -> Holder:
        """Begins a stream, if nobody has begun it under the same key or id.

        Args:
            mark: drawn for this claim, to tell it from another of the same id and owner.
        """
        keys = [self._head(name), self._log(name), self._was(name), f"{self._cluster}:streams"]
        remembered = _ms(ttl_seconds + REMEMBERED_SECONDS)
        args: list[Any] = [name.request_id, asked, fingerprint, owner, _ms(ttl_seconds), remembered]
        args += [repr(now_wall), self._max_streams, self._of("stream"), self._of("stream-log")]
        args += [name.id, mark, name.tenant]
        with store_errors():
            held, mine = await self._claim(keys=[*keys, *self._key(name)], args=args)
        return Holder(held, bool(mine))

    async def append(
        self, name: StreamName, owner: str, before: int, entries: Sequence[str]
    ) -> bool:
        """Adds entries behind the first `before`; False if it is another router's now.

        Raises:
            NotFound: the store has no such stream any more: it came back empty, or had too many.
        """
        keys = [self._head(name), self._log(name)]
        with store_errors():
            done = int(await self._append(keys=keys, args=[owner, before, *entries]))
        if done == -2:
            raise NotFound(f"the store has lost the stream of request {name.request_id}")
        return done >= 0

    async def finish(self, name: StreamName, owner: str, end: str, ttl_seconds: float) -> bool:
        """Writes its end and keeps it for so long; False if it is another router's now."""
        keys = [self._head(name), self._log(name), *self._key(name)]
        args: list[Any] = [owner, end, _ms(ttl_seconds), name.request_id]
        with store_errors():
            return bool(await self._finish(keys=keys, args=args))

    async def forget(self, name: StreamName, owner: str, mark: str) -> None:
        """Takes a claim back: the request was refused, and may be asked again."""
        keys = [self._head(name), self._log(name), self._was(name), *self._key(name)]
        with store_errors():
            await self._forget(keys=keys, args=[owner, mark])

    async def abandon(self, name: StreamName, owner: str) -> None:
        """Leaves it to any other router."""
        with store_errors():
            await self._abandon(keys=[self._head(name)], args=[owner])

    async def take_over(self, name: StreamName, head: StreamHead, owner: str, mark: str) -> bool:
        """Makes `owner` its owner, unless the router that owned it lives or another was quicker.

        Args:
            mark: drawn for this taking over; the same whenever it is asked for again.
        """
        router_id, _, incarnation = head.owner.partition(" ")
        keys = [self._head(name), f"{self._cluster}:router:{router_id}"]
        with store_errors():
            return bool(
                await self._take_over(keys=keys, args=[head.owner, incarnation, owner, mark])
            )

    async def head(self, name: StreamName) -> StreamHead | None:
        """None if there is no such stream, or not any more."""
        with store_errors():
            found = await self._client.hgetall(self._head(name))
        return StreamHead(**known_fields(StreamHead, found)) if found else None

    async def expired(self, name: StreamName) -> bool:
        """There was such a stream within a day."""
        with store_errors():
            return bool(await self._client.exists(self._was(name)))

    async def entries(self, name: StreamName, start: int) -> list[str]:
        """Those from `start` on."""
        with store_errors():
            return list(await self._client.lrange(self._log(name), start, -1))

    def _of(self, kind: str) -> str:
        return f"{self._cluster}:{kind}:"

    def _head(self, name: StreamName) -> str:
        return self._of("stream") + name.id

    def _log(self, name: StreamName) -> str:
        return self._of("stream-log") + name.id

    def _was(self, name: StreamName) -> str:
        return self._of("stream-was") + name.id

    def _key(self, name: StreamName) -> list[str]:
        """The caller's key, by digest: it may be long, and say something."""
        if not name.key:
            return []
        digest = hashlib.sha256(name.key.encode()).hexdigest()
        return [f"{self._of('stream-key')}{name.tenant}/{digest}"]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
