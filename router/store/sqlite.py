"""Finished responses, kept in SQLite.

One thread owns the connection; calls queue up for it and are answered on the event loop. Does not know
what a response means, nor when one may be read: every statement asks for the tenant as well.
docs/decisions/052-store.md gives the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from core.errors import StoreUnavailable
from router.journal import StoredResponse

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
MAX_WAITING = 1024

_CREATE = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS responses (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    previous_id TEXT,
    payload BLOB NOT NULL,
    PRIMARY KEY (tenant, id)
) STRICT;
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
PRAGMA user_version = {SCHEMA};
COMMIT;
"""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[StoredResponse] = msgspec.msgpack.Decoder(StoredResponse)


class ResponseStore:
    """Invariant: what `put` returned from is in the file and survives a killed process.

    Every method raises StoreUnavailable, one sentence, when the file cannot be used or too many calls wait.
    """

    def __init__(self, path: Path, keep_s: float | None) -> None:
        """Use `open`."""
        self._path = path
        self._keep_s = keep_s
        self._waiting = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._connection: sqlite3.Connection
        self._file: tuple[int, int] | None = None

    @classmethod
    async def open(cls, path: Path, *, keep_s: float | None = None) -> ResponseStore:
        """Open or create the file, readable by its owner only, and the folders above it.

        keep_s: responses older than this are forgotten; None keeps all of them.
        """
        store = cls(path, keep_s)
        try:
            await store._run(store._open)
        except BaseException:
            store._thread.shutdown(wait=False)
            raise
        return store

    async def put(self, stored: StoredResponse) -> None:
        """Keep a response, in place of one with the same tenant and id."""
        await self._run(lambda: self._in_place()._put(stored))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's response; another tenant's is as unknown as one that never was."""
        return await self._run(lambda: self._in_place()._get(tenant, response_id))

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a tenant's response; False if there was none."""
        return await self._run(lambda: self._in_place()._delete(tenant, response_id))

    async def close(self) -> None:
        """Finish what was accepted, then close the file; nothing is taken any more."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, self._connection.close)
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
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise StoreUnavailable(f"The store {self._path} cannot hold or read this response: {error}.") from error

    def _in_place(self) -> ResponseStore:
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
        connection = sqlite3.connect(self._path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            self._check_schema(connection)
            self._connection = connection
            self._file = _identity(self._path)
            with connection:
                self._forget_old()
        except BaseException:
            connection.close()
            raise

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            connection.executescript(_CREATE)
        elif version == 0:
            raise StoreUnavailable(f"{self._path} is a database of something else; name another file in store.path.")
        elif version != SCHEMA:
            raise StoreUnavailable(
                f"The store {self._path} has schema {version}, this router reads {SCHEMA}; "
                f"use the router that wrote it or name another file in store.path."
            )

    def _put(self, stored: StoredResponse) -> None:
        record = stored.record
        previous_id = record.request.previous_response_id
        row = (record.tenant, record.id, record.created_at, previous_id, _encoder.encode(stored))
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?)", row)
            self._forget_old()

    def _forget_old(self) -> None:
        if self._keep_s is not None:
            self._connection.execute("DELETE FROM responses WHERE created_at < ?", (time.time() - self._keep_s,))

    def _get(self, tenant: str, response_id: str) -> StoredResponse | None:
        query = "SELECT payload FROM responses WHERE tenant = ? AND id = ?"
        row = self._connection.execute(query, (tenant, response_id)).fetchone()
        return None if row is None else _decoder.decode(row[0])

    def _delete(self, tenant: str, response_id: str) -> bool:
        query = "DELETE FROM responses WHERE tenant = ? AND id = ?"
        return self._connection.execute(query, (tenant, response_id)).rowcount > 0


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
