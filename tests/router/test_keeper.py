"""What a router does for what it answers: write it down, keep its lease, go on with what others left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from core.frames import ItemStart, Text
from router.journal import LEASE_S, Began, Entry, Outcome, Said, Unfinished
from router.keeper import CLAIMS_PER_BEAT, Keeper
from tests.fake_store import FakeDatabase, FakeStore
from tests.router.fakes import FakeClock, record


def began() -> Began:
    made = record()
    return Began(Unfinished(made, made.request.input))


def said(seq: int) -> Said:
    return Said(record().id, seq, [100 + seq], [[ItemStart("message"), Text("hi")]])


class Router:
    """A keeper, and the table that it would have."""

    def __init__(self, database: FakeDatabase, name: str) -> None:
        self.store = FakeStore(database, name)
        self.refused = 0
        self.keeper = Keeper(self.store, self._count)
        self.table: dict[str, Unfinished] = {}
        self.told: list[Outcome] = []

    def _count(self) -> None:
        self.refused += 1

    async def write(self, *entries: Entry) -> list[Outcome]:
        self.told = []
        for entry in entries:
            self.keeper.journal.put(entry, self.told.append)
        self.keeper.journal.flush()
        await self.keeper.drain()
        return self.told

    async def look(self) -> None:
        await self.keeper.look_once(self.table.__contains__, lambda one: self.table.update({one.record.id: one}))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def database(clock: FakeClock) -> FakeDatabase:
    return FakeDatabase(clock=lambda: clock.mono_s)


async def test_what_is_put_is_written_and_its_outcome_told(database: FakeDatabase) -> None:
    router = Router(database, "a")
    assert await router.write(began(), said(0), said(2)) == ["kept", "kept", "refused"]
    assert router.refused == 1


async def test_a_store_that_fails_refuses_the_batch_and_says_so_once_in_the_log(
    database: FakeDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "router.keeper")
    router = Router(database, "a")
    router.store.full = True
    assert await router.write(began()) == ["refused"]
    assert await router.write(began(), said(0)) == ["refused", "refused"]
    router.store.full = False
    assert await router.write(began()) == ["kept"]
    assert router.refused == 2
    assert [line.partition(".")[0] for line in caplog.messages] == [
        "The store in memory is full; make room",
        "the store works again",
    ]


async def test_a_store_with_a_bug_keeps_nobody_waiting(database: FakeDatabase) -> None:
    class Broken(FakeStore):
        async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
            raise ZeroDivisionError

    router = Router(database, "a")
    router.keeper = Keeper(Broken(database, "a"), router._count)
    assert await router.write(began()) == ["refused"]
    assert router.refused == 1


async def test_what_a_router_left_is_taken_over_when_its_lease_is_over_and_not_before(
    database: FakeDatabase, clock: FakeClock
) -> None:
    first, second = Router(database, "a"), Router(database, "b")
    await first.look()
    await first.write(began(), said(0))
    clock.mono_s += LEASE_S - 0.1
    await second.look()
    assert second.table == {}
    clock.mono_s += 0.2
    await second.look()
    (taken,) = second.table.values()
    assert taken.ids == [100]
    assert await first.write(said(1)) == ["lost"]


async def test_a_router_that_says_so_is_succeeded_at_once(database: FakeDatabase) -> None:
    first, second = Router(database, "a"), Router(database, "b")
    await first.look()
    await first.write(began())
    await first.store.release()
    await second.look()
    assert list(second.table) == [record().id]


async def test_what_is_in_the_table_is_not_claimed(database: FakeDatabase) -> None:
    router = Router(database, "a")
    await router.look()
    await router.write(began())
    router.table[record().id] = began().begun
    await router.look()
    assert await router.write(said(0)) == ["kept"]
    del router.table[record().id]
    await router.look()
    assert router.table[record().id].epoch > 0


async def test_a_look_that_fails_is_made_again(database: FakeDatabase) -> None:
    router = Router(database, "a")
    router.store.down = True
    await router.look()
    router.store.down = False
    await router.write(began())
    keeping = asyncio.create_task(
        router.keeper.keep(lambda _: False, lambda one: router.table.update({one.record.id: one}))
    )
    while not router.table:
        await asyncio.sleep(0.01)
    keeping.cancel()
    assert router.refused == 1


async def test_what_stumbles_again_and_again_is_taken_up_more_and_more_rarely(database: FakeDatabase) -> None:
    router = Router(database, "a")
    await router.write(began())
    looks: list[int] = []
    for look in range(70):
        await router.look()
        if router.table.pop(record().id, None) is not None:
            looks.append(look)
    assert looks == [0, 1, 3, 7, 15, 31, 63]


async def test_one_response_that_cannot_be_taken_up_does_not_keep_the_others_waiting(
    database: FakeDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    router = Router(database, "a")
    others = [f"resp_t_{number}" for number in range(3)]
    for response_id in others:
        made = msgspec.structs.replace(record(), id=response_id)
        await router.write(Began(Unfinished(made, [])))
    adopted: list[str] = []

    def adopt(unfinished: Unfinished) -> None:
        if unfinished.record.id == others[1]:
            raise ZeroDivisionError
        adopted.append(unfinished.record.id)

    await router.keeper.look_once(lambda _: False, adopt)
    assert adopted == [others[0], others[2]]
    assert f"the response {others[1]} cannot be gone on with" in caplog.messages


async def test_a_lease_is_renewed_while_much_is_taken_over(database: FakeDatabase) -> None:
    class Counted(FakeStore):
        beats = 0

        async def beat(self) -> None:
            self.beats += 1
            await super().beat()

    store = Counted(database, "a")
    keeper = Keeper(store, lambda: None)
    for number in range(3 * CLAIMS_PER_BEAT):
        store.write_now([Began(Unfinished(msgspec.structs.replace(record(), id=f"resp_t_{number}"), []))])
    await keeper.look_once(lambda _: False, lambda _: None)
    assert store.beats == 4
