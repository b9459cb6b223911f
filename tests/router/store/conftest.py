"""A real Redis, and the three databases that keep one contract."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
import redis as client

from core.errors import StoreUnavailable
from router.journal import LEASE_S, Store
from router.store.redis import RedisStore
from router.store.sqlite import SqliteStore
from tests.fake_store import FakeDatabase, FakeStore
from tests.router.store.entries import CREATED_AT


class RedisServer:
    """A redis-server process that keeps nothing on disk; may be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Return when it answers."""
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        command = ["redis-server", *where, "--save", "", "--appendonly", "no", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with self.client() as found:
            for _ in range(500):
                with contextlib.suppress(client.ConnectionError):
                    found.ping()
                    return
                assert self.process.poll() is None, "redis-server has ended: is the port taken?"
                time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        """SIGKILL: everything in it is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> client.Redis:
        """Somebody else who looks in."""
        return client.Redis(port=self.port)


@pytest.fixture(scope="session")
def redis_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis(redis_for_all: RedisServer) -> RedisServer:
    """A Redis with nothing in it, for tests that leave it running."""
    with redis_for_all.client() as found:
        found.flushall()
    return redis_for_all


@pytest.fixture
def redis_of_its_own(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may kill, or start as it likes; not started yet."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


class Wall:
    """The time of day, as tests set it."""

    def __init__(self) -> None:
        self.now = float(CREATED_AT)

    def __call__(self) -> float:
        return self.now


class Place(Protocol):
    """Where stores are opened on one database. shared: by several routers at once."""

    wall: Wall
    shared: bool

    async def open(self, name: str = "a", instance: str = "1", *, keep_s: float = 0.0, max_bytes: int = 0) -> Store: ...

    async def die(self, store: Store) -> None:
        """Its router is gone without a word, long enough for everybody to know."""

    async def break_down(self) -> None:
        """Nothing can be done with the database."""

    async def mend(self) -> None: ...

    async def close(self) -> None: ...


class FakePlace:
    def __init__(self) -> None:
        self.wall = Wall()
        self.shared = True
        self.now = 100.0
        self._database = FakeDatabase(clock=lambda: self.now, wall=self.wall)
        self._stores: list[FakeStore] = []

    async def open(self, name: str = "a", instance: str = "1", *, keep_s: float = 0.0, max_bytes: int = 0) -> FakeStore:
        self._database.keep_s, self._database.max_bytes = keep_s, max_bytes
        store = FakeStore(self._database, name, instance)
        await store.beat()
        self._stores.append(store)
        return store

    async def die(self, store: Store) -> None:
        assert isinstance(store, FakeStore)
        self._stores.remove(store)
        self.now += LEASE_S
        for living in self._stores:
            await living.beat()

    async def break_down(self) -> None:
        for store in self._stores:
            store.down = True

    async def mend(self) -> None:
        for store in self._stores:
            store.down = False

    async def close(self) -> None:
        for store in self._stores:
            await store.close()


class SqlitePlace:
    def __init__(self, path: Path) -> None:
        self.wall = Wall()
        self.shared = False
        self._path = path
        self._stores: list[SqliteStore] = []

    async def open(
        self, name: str = "a", instance: str = "1", *, keep_s: float = 0.0, max_bytes: int = 0
    ) -> SqliteStore:
        store = await SqliteStore.open(self._path, name, instance, keep_s=keep_s, max_bytes=max_bytes, wall=self.wall)
        self._stores.append(store)
        return store

    async def die(self, store: Store) -> None:
        await store.close()

    async def break_down(self) -> None:
        await self._set("PRAGMA query_only = ON")

    async def mend(self) -> None:
        await self._set("PRAGMA query_only = OFF")

    async def _set(self, statement: str) -> None:
        for store in self._stores:
            await asyncio.wrap_future(store._thread.submit(0, partial(store._connection.execute, statement)))

    async def close(self) -> None:
        for store in self._stores:
            await store.close()


class RedisPlace:
    def __init__(self, server: RedisServer) -> None:
        self.wall = Wall()
        self.shared = True
        self._server = server
        self._stores: list[RedisStore] = []

    async def open(
        self, name: str = "a", instance: str = "1", *, keep_s: float = 0.0, max_bytes: int = 0
    ) -> RedisStore:
        store = await RedisStore.open(
            self._server.url, name, instance, prefix="t", keep_s=keep_s, max_bytes=max_bytes, wall=self.wall
        )
        self._stores.append(store)
        return store

    async def die(self, store: Store) -> None:
        """What Redis does after six seconds, now."""
        assert isinstance(store, RedisStore)
        with self._server.client() as found:
            assert found.delete(f"t:lease:{store._owner}") == 1

    async def break_down(self) -> None:
        with self._server.client() as found:
            # Every write is refused, as by a Redis that is full.
            found.config_set("maxmemory", "1")

    async def mend(self) -> None:
        with self._server.client() as found:
            found.config_set("maxmemory", "0")

    async def close(self) -> None:
        await self.mend()
        for store in self._stores:
            await store.close()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """Each database in turn."""
    made: Place
    match request.param:
        case "memory":
            made = FakePlace()
        case "sqlite":
            made = SqlitePlace(tmp_path / "s.sqlite")
        case _:
            made = RedisPlace(request.getfixturevalue("redis"))
    yield made
    with contextlib.suppress(StoreUnavailable):
        await made.close()
