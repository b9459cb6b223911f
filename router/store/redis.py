"""Journals and finished responses in one Redis, for all routers that share it.

A batch is a pipeline of scripts, one for each entry: each is atomic, and changes nothing unless this router
still holds the response. A router lives as long as its lease, a key that runs out. Not for Redis Cluster: a
script touches keys that it is not told of. Does not know what a response means, nor when one may be read.
docs/decisions/053-journal.md gives the reasons and the keys.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError

from core.errors import StoreUnavailable
from router.journal import (
    EPOCHS_PER_OWNER,
    LEASE_S,
    Began,
    Dropped,
    Ended,
    Entry,
    Outcome,
    Owned,
    Read,
    Said,
    StoredResponse,
    Unfinished,
)
from router.store.held import Held
from router.store.packing import Damaged, Unpackable, is_name, pack, unpack_response, unpack_unfinished

log = logging.getLogger(__name__)

T = TypeVar("T")
Argument: TypeAlias = str | bytes | int | float

MAX_WAITING = 1024
"""Readings, and claims."""
READING_CONNECTIONS = 8
CLAIMING_CONNECTIONS = 2
JOURNAL_CONNECTIONS = 2
"""For writing and for the beat, which wait for nobody's reading."""
MOST_UNCLAIMED = 256
TIMEOUT_S = 2.0
"""To connect, and for each answer to what is not large: well below a lease."""
SLOWEST_BYTES_PER_S = 8 * 1024 * 1024
"""How slowly a large entry may go to Redis."""
PIPELINE_BYTES = 2 * 1024 * 1024
"""Sent in one go, unless a single entry is larger."""
CLOSE_S = 5.0

SWEPT_BY_A_WRITE = 16
SWEPT_BY_A_BEAT = 128
"""Responses past their time that one script removes, so that nobody waits long for it."""

_FORGET = """
local P = KEYS[1]
local function forget_finished(name)
    local key = P .. ':done:' .. name
    redis.call('DECRBY', P .. ':bytes', redis.call('STRLEN', key))
    redis.call('ZREM', P .. ':by-age', name)
    return redis.call('UNLINK', key)
end
local function forget_running(id, owner)
    redis.call('UNLINK', P .. ':run:' .. id, P .. ':said:' .. id)
    redis.call('ZREM', P .. ':owned:' .. owner, id)
end
"""

# The last one stays, as it does in SQLite.
_SWEEP = """
local function sweep(first_kept, max_bytes, most)
    if first_kept ~= '' then
        local old = redis.call('ZRANGEBYSCORE', P .. ':by-age', '-inf', '(' .. first_kept, 'LIMIT', 0, most)
        for _, name in ipairs(old) do forget_finished(name) end
        most = most - #old
    end
    while max_bytes > 0 and most > 0 and tonumber(redis.call('GET', P .. ':bytes') or 0) > max_bytes
            and redis.call('ZCARD', P .. ':by-age') > 1 do
        forget_finished(redis.call('ZRANGE', P .. ':by-age', 0, 0)[1])
        most = most - 1
    end
end
"""

# held, begun: where this router's epochs of the response begin by its own knowledge, and by an entry of this batch.
# The first command that writes is one that Redis refuses when it is full: then nothing was changed.
_WRITE = (
    _FORGET
    + _SWEEP
    + """
local kind, me, held, begun, taken, id, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local run, said = P .. ':run:' .. id, P .. ':said:' .. id
local row = redis.call('HMGET', run, 'owner', 'epoch', 'count', 'tenant')
local owner = row[1]

if kind == 'began' then
    local tenant, name, created_at, count = ARGV[8], ARGV[9], ARGV[10], ARGV[11]
    if owner or redis.call('EXISTS', P .. ':done:' .. name) == 1 then return 'refused' end
    redis.call('HSET', run, 'tenant', tenant, 'created_at', created_at, 'owner', me, 'epoch', begun,
               'count', count, 'opening', payload)
    redis.call('ZADD', P .. ':owned:' .. me, created_at, id)
    redis.call('SADD', P .. ':owners', me)
    return 'kept'
end

if owner then
    if owner ~= me or (row[2] ~= held and row[2] ~= begun) then return 'lost' end
elseif taken == '1' or kind == 'read' or kind == 'said' then
    return 'lost'
end

if kind == 'read' then
    redis.call('HSET', run, 'placed', payload)
elseif kind == 'said' then
    if row[3] ~= ARGV[8] then return 'refused' end
    redis.call('RPUSH', said, payload)
    redis.call('HINCRBY', run, 'count', ARGV[9])
elseif kind == 'ended' then
    local tenant, name, created_at = ARGV[8], ARGV[9], ARGV[10]
    local done = P .. ':done:' .. name
    if (owner and row[4] ~= tenant) or redis.call('EXISTS', done) == 1 then return 'refused' end
    redis.call('SET', done, payload)
    redis.call('ZADD', P .. ':by-age', created_at, name)
    redis.call('INCRBY', P .. ':bytes', #payload)
    if owner then forget_running(id, owner) end
    sweep(ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13]))
elseif owner then
    forget_running(id, owner)
end
return 'kept'
"""
)

_DELETE = (
    _FORGET
    + """
local id, tenant, name = ARGV[1], ARGV[2], ARGV[3]
local found = 0
if redis.call('EXISTS', P .. ':done:' .. name) == 1 then found = forget_finished(name) end
local row = redis.call('HMGET', P .. ':run:' .. id, 'tenant', 'owner')
if row[1] == tenant then
    forget_running(id, row[2])
    found = 1
end
return found
"""
)

_CLAIM = """
local P, id, tenant, me, epochs = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local run = P .. ':run:' .. id
local row = redis.call('HMGET', run, 'tenant', 'owner', 'created_at', 'opening', 'placed', 'count')
if row[1] ~= tenant then return false end
local owner = row[2]
if owner ~= me and redis.call('EXISTS', P .. ':lease:' .. owner) == 1 then return {owner} end
redis.call('HINCRBY', run, 'epoch', epochs)
redis.call('HSET', run, 'owner', me)
redis.call('ZREM', P .. ':owned:' .. owner, id)
redis.call('ZADD', P .. ':owned:' .. me, row[3], id)
redis.call('SADD', P .. ':owners', me)
local said = redis.call('LRANGE', P .. ':said:' .. id, 0, -1)
return {row[4] or '', redis.call('HGET', run, 'epoch'), row[5] or '', said, row[6] or -1}
"""

_UNCLAIMED = """
local P, me, most = KEYS[1], ARGV[1], tonumber(ARGV[2])
local found = {}
for _, owner in ipairs(redis.call('SMEMBERS', P .. ':owners')) do
    if owner == me or redis.call('EXISTS', P .. ':lease:' .. owner) == 0 then
        local owned = redis.call('ZRANGE', P .. ':owned:' .. owner, 0, most - 1, 'WITHSCORES')
        if #owned == 0 and owner ~= me then redis.call('SREM', P .. ':owners', owner) end
        for i = 1, #owned, 2 do
            local tenant = redis.call('HGET', P .. ':run:' .. owned[i], 'tenant')
            if tenant then found[#found + 1] = {owner, owned[i + 1], tenant, owned[i]} end
        end
    end
end
return found
"""

_BEAT = (
    _FORGET
    + _SWEEP
    + """
redis.call('SET', P .. ':lease:' .. ARGV[1], '', 'PX', ARGV[2])
sweep(ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]))
"""
)


class RedisStore:
    """Invariant: what `write` called kept is in Redis; what that survives is Redis's own configuration.

    Every method raises StoreUnavailable, one sentence, when Redis cannot be used or too many calls wait.
    What was under way then may have been done or not; nothing is tried twice.
    """

    def __init__(
        self,
        url: str,
        owner: str,
        *,
        prefix: str,
        keep_s: float,
        max_bytes: int,
        lease_s: float,
        wall: Callable[[], float],
    ) -> None:
        """Use `open`."""
        self._where = without_password(url)
        self._prefix = prefix
        self._owner = owner
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._lease_ms = max(1, int(lease_s * 1000))
        self._wall = wall
        self._held = Held()
        self._closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._waiting = 0
        self._writing = asyncio.Lock()
        self._redis = _client(url, JOURNAL_CONNECTIONS)
        self._claiming = _client(url, CLAIMING_CONNECTIONS)
        self._reading = _client(url, READING_CONNECTIONS)
        self._write_script = self._redis.register_script(_WRITE)
        self._delete_script = self._reading.register_script(_DELETE)
        self._claim_script = self._claiming.register_script(_CLAIM)
        self._unclaimed_script = self._redis.register_script(_UNCLAIMED)
        self._beat_script = self._redis.register_script(_BEAT)

    @classmethod
    async def open(
        cls,
        url: str,
        name: str,
        instance: str,
        *,
        prefix: str = "edgechat",
        keep_s: float = 0.0,
        max_bytes: int = 0,
        lease_s: float = LEASE_S,
        wall: Callable[[], float] = time.time,
    ) -> RedisStore:
        """Connect to `redis://[:password@]host:port/db` (rediss: TLS) and begin the lease of this router.

        prefix: of every key. keep_s, max_bytes: finished responses that are older, or that no longer fit, are
        forgotten; 0 = no bound. wall: unix seconds.
        """
        owner = f"{name}/{instance}"
        store = cls(url, owner, prefix=prefix, keep_s=keep_s, max_bytes=max_bytes, lease_s=lease_s, wall=wall)
        try:
            await store.beat()
            await store._call(store._look_at_memory)
        except BaseException:
            await store.close()
            raise
        return store

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        """In order, each entry by itself; see `Store`."""
        batch = list(entries)
        return await self._call(lambda: self._write(batch))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's finished response; another tenant's is as unknown as one that never was."""
        if not is_name(tenant, response_id):
            return None
        key = f"{self._prefix}:done:{_name(tenant, response_id)}"
        packed = await self._call(lambda: self._reading.get(key), waits=True)
        if packed is None:
            return None
        try:
            response = unpack_response(cast(bytes, packed))
        except Damaged as error:
            raise StoreUnavailable(f"The store at {self._where} cannot read this response: {error}.") from error
        return response if response.record.created_at >= self._first_kept() else None

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a tenant's response, finished or not; False if there was none."""
        if not is_name(tenant, response_id):
            return False
        arguments = [response_id, tenant, _name(tenant, response_id)]
        return bool(await self._call(lambda: self._delete_script([self._prefix], arguments), waits=True))

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        """Take over a tenant's unfinished response if its owner's lease is over; see `Store`."""
        if not is_name(tenant, response_id):
            return None
        return await self._call(lambda: self._claim(tenant, response_id), waits=True)

    async def unclaimed(self) -> list[tuple[str, str]]:
        """(tenant, id) of unfinished responses, those of routers that are gone before this one's own."""
        most = MOST_UNCLAIMED + len(self._held)
        arguments: list[Argument] = [self._owner, most]
        found = await self._call(lambda: self._unclaimed_script([self._prefix], arguments))
        mine = self._owner.encode()
        rows = sorted(
            (owner == mine, float(created_at), response_id.decode(), tenant.decode())
            for owner, created_at, tenant, response_id in found
        )
        return [(tenant, response_id) for _, _, response_id, tenant in rows[:most]]

    async def beat(self) -> None:
        """Renew the lease, and forget what is past its time."""
        arguments = [self._owner, self._lease_ms, *self._retention(), SWEPT_BY_A_BEAT]
        await self._call(lambda: self._beat_script([self._prefix], arguments))

    async def release(self) -> None:
        """End the lease."""
        await self._call(lambda: self._redis.delete(f"{self._prefix}:lease:{self._owner}"))

    async def close(self) -> None:
        """Finish what was accepted, then close the connections; the lease runs out unless `release` ended it.

        Waits CLOSE_S at most.
        """
        self._closed = True
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=CLOSE_S)
            if late:
                log.error(
                    "the store at %s has not finished %d calls within %g s; they are given up",
                    self._where,
                    len(late),
                    CLOSE_S,
                )
                for task in late:
                    task.cancel()
                await asyncio.wait(late)
        for client in (self._redis, self._claiming, self._reading):
            await client.aclose()

    # -- calls

    async def _call(self, call: Callable[[], Awaitable[T]], *, waits: bool = False) -> T:
        """Do it even if the caller stops waiting: what was accepted is kept.

        waits: clients cause as many of these as they like.
        """
        if self._closed:
            raise StoreUnavailable(f"The store at {self._where} is closed; try again when the router is back.")
        if waits and self._waiting >= MAX_WAITING:
            raise StoreUnavailable(
                f"The store at {self._where} is {self._waiting} calls behind; try again shortly.", retry_after_s=1.0
            )
        task = asyncio.create_task(self._guarded(call))
        self._calls.add(task)
        self._waiting += waits
        task.add_done_callback(lambda task: self._answered(task, waits))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise StoreUnavailable(f"The store at {self._where} was closed before it answered.") from None

    def _answered(self, task: asyncio.Task[Any], waits: bool) -> None:
        self._calls.discard(task)
        self._waiting -= waits
        if not task.cancelled():
            task.exception()  # Told to the caller, who may be gone.

    async def _guarded(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except (RedisError, OSError) as error:
            if isinstance(error, ReadOnlyError):
                await self._leave()
            raise self._unavailable(error) from error

    async def _leave(self) -> None:
        """Connect anew: a master that became a replica keeps its connections, and its address may lead elsewhere."""
        for client in (self._redis, self._claiming, self._reading):
            await client.connection_pool.disconnect()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"The store at {self._where} cannot be used: {_reason(error)}.")

    async def _look_at_memory(self) -> None:
        memory = await self._redis.info("memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if memory.get("maxmemory", 0) and policy != "noeviction":
            log.warning(
                "the store at %s throws responses away when it is full (maxmemory-policy %s); set it to noeviction",
                self._where,
                policy,
            )

    # -- entries

    async def _write(self, entries: list[Entry]) -> list[Outcome]:
        async with self._writing:
            outcomes: list[Outcome] = ["refused"] * len(entries)
            errors: list[Exception] = []
            are_answered = False
            # By what is known now: a claim that is answered meanwhile is not what these were written for.
            for numbers, commands in self._pipelines(entries, self._fences(entries)):
                try:
                    answers = await self._send(commands)
                except (RedisError, OSError) as error:
                    errors.append(error)
                    break
                for number, answer in zip(numbers, answers, strict=True):
                    if isinstance(answer, Exception):
                        errors.append(answer)
                    else:
                        outcomes[number] = _outcome(answer)
                        are_answered = True
            if errors and not are_answered:
                raise errors[0]
            if errors:
                log.error("the store at %s has refused entries: %s", self._where, _reason(errors[0]))
            for entry, outcome in zip(entries, outcomes, strict=True):
                self._held.settle(entry, outcome)
            return outcomes

    async def _send(self, commands: list[list[Argument]]) -> list[Any]:
        """An answer or an error for each. The first brings the script's text: then the others know it, whatever was."""
        pipeline = self._redis.pipeline(transaction=False)
        for number, command in enumerate(commands):
            if number == 0:
                pipeline.eval(_WRITE, 1, self._prefix, *cast("list[str]", command))
            else:
                pipeline.evalsha(self._write_script.sha, 1, self._prefix, *cast("list[str]", command))
        connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        pipeline.connection = connection
        connection.socket_timeout = TIMEOUT_S + sum(map(_size, commands)) / SLOWEST_BYTES_PER_S
        try:
            return await pipeline.execute(raise_on_error=False)
        finally:
            connection.socket_timeout = TIMEOUT_S

    def _pipelines(
        self, entries: list[Entry], fences: list[list[Argument]]
    ) -> Iterator[tuple[list[int], list[list[Argument]]]]:
        """The entries' numbers, and the script's arguments for each; packed as they are sent.

        At most PIPELINE_BYTES at a time, so that no entry waits for the answers to many large ones; one that is
        larger goes alone. Without those that cannot be written.
        """
        numbers: list[int] = []
        commands: list[list[Argument]] = []
        size = 0
        for number, (entry, fence) in enumerate(zip(entries, fences, strict=True)):
            try:
                packed = pack(entry)
            except Unpackable as error:
                log.error("an entry cannot be written: %s", error)
                continue
            if commands and size + len(packed) > PIPELINE_BYTES:
                yield numbers, commands
                numbers, commands, size = [], [], 0
            numbers.append(number)
            commands.append([_kind(entry), *fence, entry.id, packed, *self._particulars(entry)])
            size += len(packed)
        if commands:
            yield numbers, commands

    def _fences(self, entries: list[Entry]) -> list[list[Argument]]:
        """For each entry by what it is recognised as this router's."""
        begun: dict[str, int] = {}
        fences: list[list[Argument]] = []
        for entry in entries:
            if isinstance(entry, Began):
                begun[entry.id] = entry.begun.epoch
            held = self._held.epoch(entry.id)
            was_taken = "1" if self._held.was_taken(entry.id) else "0"
            fences.append([self._owner, "" if held is None else held, begun.get(entry.id, ""), was_taken])
        return fences

    def _particulars(self, entry: Entry) -> list[Argument]:
        match entry:
            case Began(begun):
                record = begun.record
                return [record.tenant, _name(record.tenant, record.id), record.created_at, len(begun.ids)]
            case Said(_, seq, ids, _):
                return [seq, len(ids)]
            case Ended(response):
                record = response.record
                name = _name(record.tenant, record.id)
                return [record.tenant, name, record.created_at, *self._retention(), SWEPT_BY_A_WRITE]
            case Read() | Dropped():
                return []

    async def _claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        arguments: list[Argument] = [response_id, tenant, self._owner, EPOCHS_PER_OWNER]
        found = await self._claim_script([self._prefix], arguments)
        if found is None:
            return None
        if len(found) == 1:
            return Owned(found[0].decode().rpartition("/")[0])
        opening, epoch, placed, said, count = found
        self._held.take(response_id, int(epoch))
        try:
            unfinished = unpack_unfinished(opening, int(epoch), placed or None, said)
            if len(unfinished.ids) != int(count):
                raise Damaged(f"what follows position {len(unfinished.ids)} is missing")
            return unfinished
        except Damaged as error:
            log.error("the unfinished response %s is damaged and given up: %s", response_id, error)
            await self._write([Dropped(response_id)])
            return None

    # -- retention

    def _first_kept(self) -> float:
        return self._wall() - self._keep_s if self._keep_s else float("-inf")

    def _retention(self) -> list[Argument]:
        return [repr(self._first_kept()) if self._keep_s else "", self._max_bytes]


def _client(url: str, connections: int) -> Redis:
    """Nobody waits longer than TIMEOUT_S for one of these connections."""
    # A pipeline that is sent twice would refuse its own entries; and RESP 2 has no news between the answers, so a
    # connection that the other side closed is noticed before it is used.
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return Redis.from_pool(pool)


def without_password(url: str) -> str:
    """Where a Redis is, for people and logs."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path.rstrip('/')}"


def _name(tenant: str, response_id: str) -> str:
    """A tenant's response; with the length no tenant can spell another one's."""
    return f"{len(tenant)}:{tenant}:{response_id}"


def _kind(entry: Entry) -> str:
    match entry:
        case Began():
            return "began"
        case Read():
            return "read"
        case Said():
            return "said"
        case Ended():
            return "ended"
        case Dropped():
            return "dropped"


def _size(command: list[Argument]) -> int:
    """Roughly, in bytes."""
    return sum(len(argument) for argument in command if isinstance(argument, str | bytes))


def _outcome(answer: object) -> Outcome:
    """A script's answer; an error is for this entry alone."""
    match answer:
        case b"kept":
            return "kept"
        case b"lost":
            return "lost"
        case _:
            return "refused"


def _reason(error: Exception) -> str:
    """Redis's or the system's words in one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split())[:200].rstrip(".") or type(error).__name__
