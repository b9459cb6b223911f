"""A store in memory, for simulated time: the same contract as SQLite's and Redis's, and the same tests pass.

`FakeDatabase` is what several routers share; each opens a `FakeStore` of its own on it. All that the store does
is done by a synchronous method (`write_now` ...); the methods of `Store` call these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
from router.store.packing import Unpackable, pack, unpack_response, unpack_unfinished

MOST_UNCLAIMED = 256


class Owner(NamedTuple):
    router: str
    instance: str


@dataclass
class Running:
    """A response that a router is answering. said: packed `Said` entries; count: of output ids."""

    tenant: str
    created_at: int
    owner: Owner
    epoch: int
    opening: bytes
    count: int
    placed: bytes | None = None
    said: list[bytes] = field(default_factory=list)


@dataclass
class Finished:
    created_at: int
    packed: bytes


@dataclass
class FakeDatabase:
    """clock: seconds, of leases. wall: unix seconds, of retention. full: nothing can be written any more.

    keep_s, max_bytes: of finished responses, 0 = no bound.
    """

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    keep_s: float = 0.0
    max_bytes: int = 0
    full: bool = False
    running: dict[str, Running] = field(default_factory=dict)
    finished: dict[tuple[str, str], Finished] = field(default_factory=dict)
    leases: dict[Owner, float] = field(default_factory=dict)
    """Owner -> when it ends."""

    def lives(self, owner: Owner) -> bool:
        return self.leases.get(owner, float("-inf")) > self.clock()

    def sweep(self) -> None:
        """Forget what is too old, then the oldest until the rest fits; the last one stays."""
        if self.keep_s:
            first = self.wall() - self.keep_s
            self.finished = {key: row for key, row in self.finished.items() if row.created_at >= first}
        if self.max_bytes:
            total = sum(len(row.packed) for row in self.finished.values())
            for key in sorted(self.finished, key=lambda key: self.finished[key].created_at)[:-1]:
                if total <= self.max_bytes:
                    break
                total -= len(self.finished.pop(key).packed)


class FakeStore:
    """One router's way to the database; its lease begins with the first `beat`.

    full: this router cannot write. down: it can do nothing at all. Both raise StoreUnavailable.
    """

    def __init__(self, database: FakeDatabase, name: str = "r", instance: str = "i") -> None:
        self.database = database
        self.owner = Owner(name, instance)
        self.full = False
        self.down = False
        self._held = Held()

    # -- the contract ------------------------------------------------------------------------------

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        return self.write_now(entries)

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        return self.get_now(tenant, response_id)

    async def delete(self, tenant: str, response_id: str) -> bool:
        return self.delete_now(tenant, response_id)

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        return self.claim_now(tenant, response_id)

    async def unclaimed(self) -> list[tuple[str, str]]:
        return self.unclaimed_now()

    async def beat(self) -> None:
        self.beat_now(self.database.clock())

    async def release(self) -> None:
        self.release_now()

    async def close(self) -> None:
        self.down = True

    # -- the same, at once -------------------------------------------------------------------------

    def write_now(self, entries: Sequence[Entry]) -> list[Outcome]:
        self._check_writing()
        outcomes: list[Outcome] = []
        begun: dict[str, int] = {}
        for entry in entries:
            if isinstance(entry, Began):
                begun[entry.id] = entry.begun.epoch
            mine = {self._held.epoch(entry.id), begun.get(entry.id)}
            try:
                outcome = self._write(entry, pack(entry), mine)
            except Unpackable:
                outcome = "refused"
            outcomes.append(outcome)
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._held.settle(entry, outcome)
        self.database.sweep()
        return outcomes

    def get_now(self, tenant: str, response_id: str) -> StoredResponse | None:
        self._check_up()
        self.database.sweep()
        row = self.database.finished.get((tenant, response_id))
        return None if row is None else unpack_response(row.packed)

    def delete_now(self, tenant: str, response_id: str) -> bool:
        self._check_up()
        found = self.database.finished.pop((tenant, response_id), None) is not None
        if self._running(tenant, response_id) is not None:
            del self.database.running[response_id]
            found = True
        return found

    def claim_now(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        self._check_up()
        row = self._running(tenant, response_id)
        if row is None:
            return None
        if row.owner != self.owner and self.database.lives(row.owner):
            return Owned(row.owner.router)
        self._check_writing()
        row.owner, row.epoch = self.owner, row.epoch + EPOCHS_PER_OWNER
        self._held.take(response_id, row.epoch)
        return unpack_unfinished(row.opening, row.epoch, row.placed, row.said)

    def unclaimed_now(self) -> list[tuple[str, str]]:
        self._check_up()
        rows = [
            (row.owner == self.owner, row.created_at, response_id, row.tenant)
            for response_id, row in self.database.running.items()
            if row.owner == self.owner or not self.database.lives(row.owner)
        ]
        return [(tenant, response_id) for _, _, response_id, tenant in sorted(rows)[: MOST_UNCLAIMED + len(self._held)]]

    def beat_now(self, now: float) -> None:
        """now: of the database's clock."""
        self._check_up()
        self.database.leases[self.owner] = now + LEASE_S
        self.database.sweep()

    def release_now(self) -> None:
        self._check_up()
        self.database.leases.pop(self.owner, None)

    def _running(self, tenant: str, response_id: str) -> Running | None:
        row = self.database.running.get(response_id)
        return row if row is not None and row.tenant == tenant else None

    def _check_up(self) -> None:
        if self.down:
            raise StoreUnavailable("The store in memory is down; bring it up again.")

    def _check_writing(self) -> None:
        self._check_up()
        if self.full or self.database.full:
            raise StoreUnavailable("The store in memory is full; make room.")

    def _write(self, entry: Entry, packed: bytes, mine: set[int | None]) -> Outcome:
        """mine: where this router's epochs of the response begin."""
        running, finished = self.database.running, self.database.finished
        row = running.get(entry.id)
        if isinstance(entry, Began):
            begun = entry.begun
            if row is not None or (begun.record.tenant, entry.id) in finished:
                return "refused"
            record = begun.record
            running[entry.id] = Running(
                record.tenant, record.created_at, self.owner, begun.epoch, packed, len(begun.ids)
            )
            return "kept"
        if row is None:
            if self._held.was_taken(entry.id):
                return "lost"
        elif row.owner != self.owner or row.epoch not in mine:
            return "lost"
        match entry:
            case Ended(response):
                return self._end(response, row, packed)
            case Dropped():
                running.pop(entry.id, None)
                return "kept"
        if row is None:
            return "lost"
        match entry:
            case Read():
                row.placed = packed
            case Said(_, seq, ids, _):
                if seq != row.count:
                    return "refused"
                row.said.append(packed)
                row.count += len(ids)
        return "kept"

    def _end(self, response: StoredResponse, row: Running | None, packed: bytes) -> Outcome:
        record = response.record
        key = record.tenant, record.id
        if key in self.database.finished or (row is not None and row.tenant != record.tenant):
            return "refused"
        self.database.running.pop(record.id, None)
        self.database.finished[key] = Finished(record.created_at, packed)
        return "kept"
