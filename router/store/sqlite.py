"""Journals and finished responses in one SQLite file, for one router.

One thread owns the connection; calls queue up for it and are answered on the event loop. A batch is one
transaction. Does not know what a response means, nor when one may be read: every reading asks for the tenant.
docs/decisions/052-store.md and 053-journal.md give the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from core.errors import StoreUnavailable
from router.journal import (
    EPOCHS_PER_OWNER,
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
from router.store.lock import FileLock
from router.store.packing import Damaged, Unpackable, is_name, pack, unpack_response, unpack_unfinished

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 2
MAX_WAITING = 1024
MOST_UNCLAIMED = 256
BUSY_S = 1.0
"""How long somebody else's reading of the file, a backup's say, is waited for."""

SWEPT_BY_A_WRITE = 32
SWEPT_BY_A_BEAT = 128
"""Responses past their time that are removed in one go, so that nothing waits long for it."""

_FINISHED = """
CREATE TABLE responses (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    previous_id TEXT,
    payload BLOB NOT NULL,
    PRIMARY KEY (tenant, id)
) STRICT;
CREATE INDEX responses_by_age ON responses (created_at);
"""

# What schema 2 adds. Blobs come last in a row: what is asked most often lies before them.
_JOURNAL = f"""
CREATE TABLE running (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    owner TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    begun INTEGER NOT NULL,
    placed BLOB,
    opening BLOB NOT NULL
) STRICT;
CREATE TABLE said (
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    next INTEGER NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (id, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE total (bytes INTEGER NOT NULL) STRICT;
INSERT INTO total SELECT coalesce(sum(length(payload)), 0) FROM responses;
CREATE TRIGGER responses_came AFTER INSERT ON responses
BEGIN UPDATE total SET bytes = bytes + length(new.payload); END;
CREATE TRIGGER responses_went AFTER DELETE ON responses
BEGIN UPDATE total SET bytes = bytes - length(old.payload); END;
PRAGMA user_version = {SCHEMA};
"""


class _Row(NamedTuple):
    """What decides about an entry of a running response."""

    tenant: str
    owner: str
    begun: int


class SqliteStore:
    """Invariant: what `write` called kept is in the file and survives a killed process.

    Every method raises StoreUnavailable, one sentence, when the file cannot be used or too many calls wait.
    """

    def __init__(
        self,
        path: Path,
        owner: str,
        *,
        keep_s: float,
        max_bytes: int,
        durability: Literal["process", "power"],
        wall: Callable[[], float],
    ) -> None:
        """Use `open`."""
        self._path = path
        self._owner = owner
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._wall = wall
        self._waiting = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._lock = FileLock(path)
        self._held = Held()
        self._scraps = False
        """Whether the write-ahead log may hold what was forgotten since."""
        self._connection: sqlite3.Connection
        self._file: tuple[int, int] | None = None

    @classmethod
    async def open(
        cls,
        path: Path,
        name: str,
        instance: str,
        *,
        keep_s: float = 0.0,
        max_bytes: int = 0,
        durability: Literal["process", "power"] = "process",
        wall: Callable[[], float] = time.time,
    ) -> SqliteStore:
        """Open or create the file for the router `name`, readable by its owner only, and the folders above it.

        keep_s, max_bytes: finished responses that are older, or that no longer fit, are forgotten; 0 = no bound.
        durability: what a kept entry survives: a killed process, or a power cut as well. wall: unix seconds.
        """
        owner = f"{name}/{instance}"
        store = cls(path, owner, keep_s=keep_s, max_bytes=max_bytes, durability=durability, wall=wall)
        try:
            await store._run(store._open)
        except BaseException:
            store._lock.release()
            store._thread.shutdown(wait=False)
            raise
        return store

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        """One transaction for all of them; see `Store`."""
        batch = list(entries)
        return await self._run(lambda: self._in_place()._write(batch))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's finished response; another tenant's is as unknown as one that never was."""
        return await self._run(lambda: self._in_place()._get(tenant, response_id))

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a tenant's response, finished or not; False if there was none. Its text is in no file any more."""
        return await self._run(lambda: self._in_place()._delete(tenant, response_id))

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        """Take over a tenant's unfinished response: no other router can live that has this file."""
        return await self._run(lambda: self._in_place()._claim(tenant, response_id))

    async def unclaimed(self) -> list[tuple[str, str]]:
        """(tenant, id) of unfinished responses, those of routers that are gone before this one's own."""
        return await self._run(lambda: self._in_place()._unclaimed())

    async def beat(self) -> None:
        """Forget what is past its time; the file's lock is all the lease there is."""
        await self._run(lambda: self._in_place()._tidy())

    async def release(self) -> None:
        """Nothing to do: `close` gives the lock back."""

    async def close(self) -> None:
        """Finish what was accepted, then close the file; nothing is taken any more."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, self._close)
        self._thread.shutdown(wait=False)

    def _run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Queue `call` for the thread. It is done even if the caller stops waiting: what was accepted is kept."""
        if self._closed:
            raise StoreUnavailable(f"The store {self._path} is closed; try again when the router is back.")
        if self._waiting >= MAX_WAITING:
            raise StoreUnavailable(
                f"The store {self._path} is {self._waiting} calls behind; try again shortly.", retry_after_s=1.0
            )
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, call)
        done.add_done_callback(self._answered)
        return asyncio.shield(done)

    def _answered(self, _done: object) -> None:
        self._waiting -= 1

    # -- on the thread -------------------------------------------------------------------------

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"The store {self._path} cannot be used: {_reason(error)}.") from error

    def _in_place(self) -> SqliteStore:
        """Begin anew if the file was removed or replaced: SQLite would go on writing to what nobody can find again."""
        if self._file != _identity(self._path):
            log.error("the store %s was removed or replaced while it was in use; it is opened again", self._path)
            self._connection.close()
            self._open()
        return self

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Before SQLite sees it, so that its -wal and -shm files take over the mode.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        self._lock.take()
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_S)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA secure_delete = ON")
            self._bring_up_to_date(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._file = _identity(self._path)

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables:
            raise StoreUnavailable(f"{self._path} is a database of something else; name another file in store.path.")
        if version not in {0, 1, SCHEMA}:
            raise StoreUnavailable(
                f"The store {self._path} has schema {version}, this router reads {SCHEMA}; "
                f"use the router that wrote it or name another file in store.path."
            )
        if version < SCHEMA:
            missing = _JOURNAL if version == 1 else _FINISHED + _JOURNAL
            try:
                connection.executescript(f"BEGIN IMMEDIATE;{missing}COMMIT;")
            except BaseException:
                if connection.in_transaction:
                    connection.rollback()
                raise

    def _close(self) -> None:
        try:
            self._connection.close()
        finally:
            self._lock.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    # -- entries

    def _write(self, entries: list[Entry]) -> list[Outcome]:
        packed = [_packed(entry) for entry in entries]
        with self._transaction():
            outcomes: list[Outcome] = [
                "refused" if blob is None else self._write_one(entry, blob)
                for entry, blob in zip(entries, packed, strict=True)
            ]
            if any(isinstance(entry, Ended) for entry in entries):
                self._sweep(SWEPT_BY_A_WRITE)
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._held.settle(entry, outcome)
            if isinstance(entry, Dropped):
                self._scraps = True
        return outcomes

    def _write_one(self, entry: Entry, packed: bytes) -> Outcome:
        row = self._row(entry.id)
        if isinstance(entry, Began):
            return self._begin(entry.begun, row, packed)
        if row is None:
            if self._held.was_taken(entry.id) or isinstance(entry, Read | Said):
                return "lost"
        elif row.owner != self._owner:
            return "lost"
        match entry:
            case Read():
                self._connection.execute("UPDATE running SET placed = ? WHERE id = ?", (packed, entry.id))
            case Said(_, seq, ids, _):
                assert row is not None
                if seq != self._next(entry.id, row.begun):
                    return "refused"
                if ids:
                    row_of_it = (entry.id, seq, seq + len(ids), packed)
                    self._connection.execute("INSERT INTO said VALUES (?, ?, ?, ?)", row_of_it)
            case Ended(response):
                return self._end(response, row, packed)
            case Dropped():
                self._forget_running(entry.id)
        return "kept"

    def _row(self, response_id: str) -> _Row | None:
        query = "SELECT tenant, owner, begun FROM running WHERE id = ?"
        found = self._connection.execute(query, (response_id,)).fetchone()
        return None if found is None else _Row(*found)

    def _next(self, response_id: str, begun: int) -> int:
        """The position of the next output id; `begun`: how many there were when it began."""
        query = "SELECT next FROM said WHERE id = ? ORDER BY seq DESC LIMIT 1"
        found = self._connection.execute(query, (response_id,)).fetchone()
        return begun if found is None else int(found[0])

    def _begin(self, begun: Unfinished, row: _Row | None, packed: bytes) -> Outcome:
        record = begun.record
        if row is not None or self._is_finished(record.tenant, record.id):
            return "refused"
        values = (record.id, record.tenant, record.created_at, self._owner, begun.epoch, len(begun.ids), packed)
        self._connection.execute("INSERT INTO running VALUES (?, ?, ?, ?, ?, ?, NULL, ?)", values)
        return "kept"

    def _end(self, response: StoredResponse, row: _Row | None, packed: bytes) -> Outcome:
        record = response.record
        if self._is_finished(record.tenant, record.id) or (row is not None and row.tenant != record.tenant):
            return "refused"
        values = (record.tenant, record.id, record.created_at, record.request.previous_response_id, packed)
        self._connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", values)
        self._forget_running(record.id)
        return "kept"

    def _is_finished(self, tenant: str, response_id: str) -> bool:
        query = "SELECT 1 FROM responses WHERE tenant = ? AND id = ?"
        return self._connection.execute(query, (tenant, response_id)).fetchone() is not None

    def _forget_running(self, response_id: str) -> None:
        self._connection.execute("DELETE FROM said WHERE id = ?", (response_id,))
        self._connection.execute("DELETE FROM running WHERE id = ?", (response_id,))

    # -- whole responses

    def _get(self, tenant: str, response_id: str) -> StoredResponse | None:
        if not is_name(tenant, response_id):
            return None
        query = "SELECT payload FROM responses WHERE tenant = ? AND id = ? AND created_at >= ?"
        row = self._connection.execute(query, (tenant, response_id, self._first_kept())).fetchone()
        if row is None:
            return None
        try:
            return unpack_response(row[0])
        except Damaged as error:
            raise StoreUnavailable(f"The store {self._path} cannot read this response: {error}.") from error

    def _delete(self, tenant: str, response_id: str) -> bool:
        if not is_name(tenant, response_id):
            return False
        with self._transaction() as connection:
            query = "DELETE FROM responses WHERE tenant = ? AND id = ?"
            found = connection.execute(query, (tenant, response_id)).rowcount > 0
            row = self._row(response_id)
            if row is not None and row.tenant == tenant:
                self._forget_running(response_id)
                found = True
        # One that was running has been dropped before: it is not found, and yet it is to be gone.
        if found or self._scraps:
            self._scrub()
        return found

    def _claim(self, tenant: str, response_id: str) -> Unfinished | None:
        if not is_name(tenant, response_id):
            return None
        with self._transaction() as connection:
            query = "SELECT epoch, placed, opening FROM running WHERE id = ? AND tenant = ?"
            row = connection.execute(query, (response_id, tenant)).fetchone()
            if row is None:
                return None
            epoch = row[0] + EPOCHS_PER_OWNER
            said = connection.execute("SELECT payload FROM said WHERE id = ? ORDER BY seq", (response_id,))
            try:
                unfinished = unpack_unfinished(row[2], epoch, row[1], (payload for (payload,) in said))
            except Damaged as error:
                log.error("the unfinished response %s is damaged and given up: %s", response_id, error)
                self._forget_running(response_id)
                return None
            connection.execute(
                "UPDATE running SET owner = ?, epoch = ? WHERE id = ?", (self._owner, epoch, response_id)
            )
        self._held.take(response_id, epoch)
        return unfinished

    def _unclaimed(self) -> list[tuple[str, str]]:
        query = "SELECT tenant, id FROM running ORDER BY owner = ?, created_at, id LIMIT ?"
        return [(tenant, found) for tenant, found in self._connection.execute(query, (self._owner, MOST_UNCLAIMED))]

    # -- retention

    def _tidy(self) -> None:
        with self._transaction():
            self._sweep(SWEPT_BY_A_BEAT)
        if self._scraps:
            self._scrub()

    def _first_kept(self) -> float:
        return self._wall() - self._keep_s if self._keep_s else float("-inf")

    def _sweep(self, most: int) -> None:
        """Forget up to `most` responses: those too old, then the oldest until the rest fits. The last one stays."""
        oldest = "DELETE FROM responses WHERE rowid IN (SELECT rowid FROM responses {} ORDER BY created_at LIMIT ?)"
        swept = 0
        if self._keep_s:
            query = oldest.format("WHERE created_at < ?")
            swept = self._connection.execute(query, (self._first_kept(), most)).rowcount
        while self._max_bytes and swept < most and self._is_too_big():
            self._connection.execute(oldest.format(""), (1,))
            swept += 1
        if swept:
            self._scraps = True

    def _is_too_big(self) -> bool:
        query = "SELECT bytes > ? AND (SELECT count(*) FROM (SELECT 1 FROM responses LIMIT 2)) = 2 FROM total"
        return bool(self._connection.execute(query, (self._max_bytes,)).fetchone()[0])

    def _scrub(self) -> None:
        """Empty the write-ahead log, which still has what was forgotten; later, if somebody reads in the file."""
        (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._scraps = bool(busy)


def _packed(entry: Entry) -> bytes | None:
    try:
        return pack(entry)
    except Unpackable as error:
        log.error("an entry cannot be written: %s", error)
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to; None for none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _reason(error: sqlite3.Error | OSError) -> str:
    """SQLite's or the system's words, without the path, which the sentence names already."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
