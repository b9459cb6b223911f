"""Journals and finished responses in one SQLite file, for one router.

One thread owns the connection; calls queue up for it, the journal's first, and are answered on the event loop. A
batch is one transaction. Does not know what a response means, nor when one may be read: every reading asks for the
tenant.
docs/decisions/052-store.md and 053-journal.md give the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from enum import IntEnum
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
from router.store.traces import MOST_PAGES, Traces
from router.store.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 2
MAX_WAITING = 1024
"""Of each kind of call."""
MOST_UNCLAIMED = 256
BUSY_S = 1.0
"""How long somebody else who has locked the file is waited for."""
CLOSE_S = 5.0
LOG_BYTES = 32 * 1024 * 1024
"""The write-ahead log is moved into the file when it has grown by so much: the disk may take long to confirm that."""
BEATS_PER_SCRUB = 30
"""How long it may wait what only an end has left: the response that is kept has the same text."""

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

# What schema 2 adds. Openings are large and never change: they have a table of their own, which only claims read.
_JOURNAL = f"""
CREATE TABLE running (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    owner TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    begun INTEGER NOT NULL,
    placed BLOB
) STRICT;
CREATE TABLE openings (
    id TEXT PRIMARY KEY,
    payload BLOB NOT NULL
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


class _Urgency(IntEnum):
    """What waits for the thread is done in this order."""

    KEEP = 0
    """The journal and the beat. Not bounded: their caller has one of each under way."""
    CLAIM = 1
    READ = 2


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
        self._waiting = dict.fromkeys(_Urgency, 0)
        self._closed = False
        self._thread = Worker("store")
        self._lock = FileLock(path)
        self._held = Held()
        self._scraps = False
        self._leavings = False
        self._beats = 0
        """Whether the files may hold what was forgotten since."""
        self._connection: sqlite3.Connection
        self._file: tuple[int, int] | None = None
        self._descriptor = -1
        self._log: Path
        self._log_limit = LOG_BYTES
        self._traces: Traces

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
            await store._run(store._open, _Urgency.KEEP)
        except BaseException:
            store._thread.stop(store._lock.release)
            raise
        return store

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        """One transaction for all of them; see `Store`."""
        batch = list(entries)
        return await self._run(lambda: self._in_place()._write(batch), _Urgency.KEEP)

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's finished response; another tenant's is as unknown as one that never was."""
        return await self._run(lambda: self._in_place()._get(tenant, response_id), _Urgency.READ)

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a tenant's response, finished or not; False if there was none. Its text is in no file any more."""
        return await self._run(lambda: self._in_place()._delete(tenant, response_id), _Urgency.READ)

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        """Take over a tenant's unfinished response: no other router can live that has this file."""
        return await self._run(lambda: self._in_place()._claim(tenant, response_id), _Urgency.CLAIM)

    async def unclaimed(self) -> list[tuple[str, str]]:
        """(tenant, id) of unfinished responses, those of routers that are gone before this one's own."""
        return await self._run(lambda: self._in_place()._unclaimed(), _Urgency.CLAIM)

    async def beat(self) -> None:
        """Forget what is past its time; the file's lock is all the lease there is."""
        await self._run(lambda: self._in_place()._tidy(), _Urgency.KEEP)

    async def release(self) -> None:
        """Nothing to do: `close` gives the lock back."""

    async def close(self) -> None:
        """Finish what was accepted, then close the file; nothing is taken any more. Waits CLOSE_S at most."""
        if self._closed:
            return
        self._closed = True
        done = self._thread.stop(lambda: self._guarded(self._close))
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.shield(asyncio.wrap_future(done))
        except TimeoutError:
            log.error("the store %s has not finished within %g s and is left to itself", self._path, CLOSE_S)

    def _run(self, call: Callable[[], T], urgency: _Urgency) -> asyncio.Future[T]:
        """Queue `call` for the thread. It is done even if the caller stops waiting: what was accepted is kept."""
        if self._closed:
            raise StoreUnavailable(f"The store {self._path} is closed; try again when the router is back.")
        waiting = self._waiting[urgency]
        if waiting >= MAX_WAITING and urgency != _Urgency.KEEP:
            raise StoreUnavailable(
                f"The store {self._path} is {waiting} calls behind; try again shortly.", retry_after_s=1.0
            )
        self._waiting[urgency] += 1
        done = asyncio.wrap_future(self._thread.submit(urgency, lambda: self._guarded(call)))
        done.add_done_callback(lambda _: self._answered(urgency))
        return asyncio.shield(done)

    def _answered(self, urgency: _Urgency) -> None:
        self._waiting[urgency] -= 1

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
            if self._file is not None:
                self._shut()
            self._open()
        return self

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Kept open as long as SQLite has the file open: with any descriptor that is closed all its locks would go.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._look()
            self._lock.take()
            # Before SQLite makes its -wal and -shm files, so that they take over the mode.
            os.fchmod(descriptor, 0o600)
            self._descriptor = descriptor
            self._connect()
        except BaseException:
            os.close(descriptor)
            raise
        self._file = _identity(self._path)

    def _look(self) -> None:
        """Refuse a database that is not ours, without leaving anything in it or beside it."""
        path = self._path.resolve()
        if not path.is_file() or not path.stat().st_size:
            return
        # Without a log nobody has the file open: then there is nothing to be locked or shared.
        way = "mode=ro" if _log_of(path).exists() else "immutable=1"
        with closing(sqlite3.connect(f"{path.as_uri()}?{way}", uri=True, timeout=BUSY_S)) as connection:
            self._check_schema(connection)

    def _check_schema(self, connection: sqlite3.Connection) -> int:
        """The schema's version; 0 for an empty file."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables:
            raise StoreUnavailable(f"{self._path} is a database of something else; name another file in store.path.")
        if version not in {0, 1, SCHEMA}:
            raise StoreUnavailable(
                f"The store {self._path} has schema {version}, this router reads {SCHEMA}; "
                f"use the router that wrote it or name another file in store.path."
            )
        return int(version)

    def _connect(self) -> None:
        self._log = _log_of(self._path.resolve())
        self._log_limit = LOG_BYTES
        self._traces = Traces(self._descriptor, self._log)
        self._scraps = not self._lock.was_left_clean
        was_killed = self._log.exists()
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_S)
        try:
            connection.execute("PRAGMA auto_vacuum = NONE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute(f"PRAGMA max_page_count = {MOST_PAGES}")
            if connection.execute("PRAGMA auto_vacuum").fetchone() != (0,):
                raise StoreUnavailable(
                    f"The store {self._path} has auto_vacuum, with which nothing can be deleted for good; "
                    "run `PRAGMA auto_vacuum = NONE; VACUUM;` on it or name another file in store.path."
                )
            version = self._check_schema(connection)
            self._connection = connection
            if self._scraps:
                # What a killed router has written is in its log, unless somebody else has moved that into the file.
                if version < SCHEMA or not was_killed:
                    self._traces.note_all()
                self._try_to_scrub()
            self._bring_up_to_date(version)
        except BaseException:
            connection.close()
            raise

    def _bring_up_to_date(self, version: int) -> None:
        if version == SCHEMA:
            return
        missing = _JOURNAL if version == 1 else _FINISHED + _JOURNAL
        try:
            self._connection.executescript(f"BEGIN IMMEDIATE;{missing}COMMIT;")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise

    def _close(self) -> None:
        clean = False
        try:
            if self._file is not None:
                self._try_to_scrub()
                clean = not self._scraps
                self._shut()
        finally:
            self._lock.release(clean=clean)

    def _shut(self) -> None:
        self._file = None
        try:
            self._connection.close()
        finally:
            os.close(self._descriptor)

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
            self._scraps = self._scraps or isinstance(entry, Dropped)
            self._leavings = self._leavings or isinstance(entry, Ended)
        self._shorten_log()
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
        values = (record.id, record.tenant, record.created_at, self._owner, begun.epoch, len(begun.ids))
        self._connection.execute("INSERT INTO running VALUES (?, ?, ?, ?, ?, ?, NULL)", values)
        self._connection.execute("INSERT INTO openings VALUES (?, ?)", (record.id, packed))
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
        for table in ("said", "openings", "running"):
            self._connection.execute(f"DELETE FROM {table} WHERE id = ?", (response_id,))

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
            query = (
                "SELECT epoch, placed, coalesce(payload, x'') FROM running LEFT JOIN openings USING (id) "
                "WHERE id = ? AND tenant = ?"
            )
            row = connection.execute(query, (response_id, tenant)).fetchone()
            if row is None:
                return None
            epoch = row[0] + EPOCHS_PER_OWNER
            query = "SELECT payload FROM said WHERE id = ? ORDER BY seq"
            # All of it: a reading that is not finished would keep the log from being emptied.
            said = connection.execute(query, (response_id,)).fetchall()
            try:
                unfinished = unpack_unfinished(row[2], epoch, row[1], (payload for (payload,) in said))
            except Damaged as error:
                log.error("the unfinished response %s is damaged and given up: %s", response_id, error)
                self._forget_running(response_id)
                self._scraps = True
                return None
            connection.execute(
                "UPDATE running SET owner = ?, epoch = ? WHERE id = ?", (self._owner, epoch, response_id)
            )
        self._held.take(response_id, epoch)
        return unfinished

    def _unclaimed(self) -> list[tuple[str, str]]:
        query = "SELECT tenant, id FROM running ORDER BY owner = ?, created_at, id LIMIT ?"
        most = MOST_UNCLAIMED + len(self._held)
        return [(tenant, found) for tenant, found in self._connection.execute(query, (self._owner, most))]

    # -- retention

    def _tidy(self) -> None:
        with self._transaction():
            self._sweep(SWEPT_BY_A_BEAT)
        self._beats += 1
        if self._scraps or (self._leavings and self._beats >= BEATS_PER_SCRUB):
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

    # -- what is left of what was forgotten

    def _scrub(self) -> None:
        """Leave nothing in any file that is in no row; later, if somebody reads in the file. That is not waited for."""
        self._scraps = True
        self._connection.execute("PRAGMA busy_timeout = 0")
        try:
            self._scraps = not self._is_scrubbed()
            if not self._scraps:
                self._leavings, self._beats = False, 0
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")

    def _is_scrubbed(self) -> bool:
        connection = self._connection
        self._traces.note()
        (busy, written, moved) = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if busy or written != moved:
            return False
        # The log is in the file, and nobody can write to either.
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._traces.note():
                return False
            self._traces.wipe()
        finally:
            connection.rollback()
        # Only now: if the process is killed before, the log says which pages are to be wiped.
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        # Pages as they were before would be written again.
        connection.execute("PRAGMA shrink_memory")
        return not busy

    def _shorten_log(self) -> None:
        """Keep the log short: else a killed router's successor has much to read."""
        size = _size(self._log)
        if size >= self._log_limit:
            self._try_to_scrub()
            self._log_limit = (size if self._scraps else 0) + LOG_BYTES

    def _try_to_scrub(self) -> None:
        """What is written is kept whether or not this works: if not, the next beat says so, and the next start."""
        try:
            self._scrub()
        except (sqlite3.Error, OSError) as error:
            log.warning("the store %s cannot be tidied up at the moment: %s", self._path, _reason(error))


def _packed(entry: Entry) -> bytes | None:
    try:
        return pack(entry)
    except Unpackable as error:
        log.error("an entry cannot be written: %s", error)
        return None


def _log_of(path: Path) -> Path:
    """SQLite's write-ahead log of a file that is no link."""
    return path.with_name(path.name + "-wal")


def _size(path: Path) -> int:
    """Of a file, in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
