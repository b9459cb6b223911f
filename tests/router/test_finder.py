"""Where a response is looked for, in which order, and that it is taken over once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from core.errors import EdgechatError, ResponseNotFound, StoreUnavailable
from core.stream import EndRecord, RequestRecord
from router.errors import Draining, RouterUnreachable
from router.finder import Elsewhere
from router.http.context import Context
from router.http.readers import Whole
from router.journal import LEASE_S, Began, Ended, Owned, Said, StoredResponse, Unfinished
from router.registry import RouterAddress
from router.server import make_context
from router.sessions import Running
from tests.fake_store import FakeDatabase, FakeStore
from tests.router.fakes import CONFIG, FakeClock, FakeLinks, record, words
from tests.router.reading import until

TENANT, ID = "acme", "resp_t_1"


class GatedStore(FakeStore):
    """Counts what it is asked, and answers a claim when `open` is set. before_claim: what happens just before one."""

    def __init__(self, database: FakeDatabase, name: str, instance: str = "i") -> None:
        super().__init__(database, name, instance)
        self.asked: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.before_claim: Callable[[], object] = tuple

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        self.asked.append("get")
        return await super().get(tenant, response_id)

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        self.asked.append("claim")
        self.before_claim()
        claimed = await super().claim(tenant, response_id)
        await self.open.wait()
        return claimed


@dataclass
class Bench:
    """A router without a port, named `t`, that knows the routers `u` and `v`."""

    context: Context
    store: GatedStore
    other: FakeStore
    links: FakeLinks
    clock: FakeClock

    async def find(self, response_id: str = ID, tenant: str = TENANT) -> Running | StoredResponse | Elsewhere:
        return await self.context.finder.find(tenant, response_id)

    def adopted(self) -> float:
        return float(self.context.metrics.adopted._value.get())


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    clock, links = FakeClock(), FakeLinks()
    database = FakeDatabase(clock=lambda: clock.mono_s)
    store, other = GatedStore(database, "t"), FakeStore(database, "u")
    store.beat_now(clock.mono_s)
    other.beat_now(clock.mono_s)
    context = make_context(CONFIG, "secret", links, store, clock)
    links.on_event = context.sessions.on_link_event
    context.routers.set_addresses([RouterAddress("u", "http://127.0.0.1:1"), RouterAddress("v", "http://127.0.0.1:1")])
    yield Bench(context, store, other, links, clock)
    context.sessions.suspend()
    await context.keeper.drain()
    await context.routers.close()


def begun() -> list[Began | Said]:
    ids, deltas = words("one", " two")
    return [Began(Unfinished(record(), record().request.input)), Said(ID, 0, ids[:1], deltas[:1])]


def ended(made: RequestRecord | None = None) -> StoredResponse:
    ids, deltas = words("one", " two")
    return StoredResponse(made or record(), ids, deltas, EndRecord(status="completed", completed_at=1001))


async def test_what_runs_here_is_found_without_asking_the_store(bench: Bench) -> None:
    running = bench.context.sessions.adopt(Unfinished(record(), record().request.input))
    assert await bench.find() is running
    assert bench.store.asked == []


async def test_what_has_ended_is_found_in_the_store(bench: Bench) -> None:
    bench.other.write_now([Ended(ended())])
    assert await bench.find() == ended()
    assert await bench.context.finder.find_here(TENANT, ID) == ended()
    assert bench.store.asked == ["get", "get"]


async def test_what_lost_its_router_is_taken_over_once_however_many_ask(bench: Bench) -> None:
    bench.other.write_now(begun())
    bench.clock.mono_s += LEASE_S
    bench.store.open.clear()
    asking = [asyncio.create_task(bench.find()) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    bench.store.open.set()
    found = await asyncio.gather(*asking)
    assert {id(running) for running in found} == {id(await bench.find())}
    assert isinstance(found[0], Running)
    assert found[0].session.ids == [100]
    assert (bench.store.asked, bench.adopted()) == (["get", "claim"], 1)


async def test_what_was_claimed_is_taken_over_though_nobody_waits_for_it_any_more(bench: Bench) -> None:
    bench.other.write_now(begun())
    bench.clock.mono_s += LEASE_S
    bench.store.open.clear()
    asking = asyncio.create_task(bench.find())
    await until(lambda: bench.store.asked == ["get", "claim"])
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    bench.store.open.set()
    await until(lambda: ID in bench.context.sessions)
    assert bench.adopted() == 1


async def test_the_keeper_and_a_client_that_come_at_once_take_it_over_once(bench: Bench) -> None:
    bench.other.write_now(begun())
    bench.clock.mono_s += LEASE_S
    bench.store.open.clear()
    sessions = bench.context.sessions
    keeping = asyncio.create_task(bench.context.keeper.look_once(sessions.__contains__, sessions.adopt))
    asking = asyncio.create_task(bench.find())
    await until(lambda: bench.store.asked.count("claim") == 2)
    bench.store.open.set()
    await keeping
    assert await asking is sessions.find(TENANT, ID)
    assert bench.adopted() == 1


async def test_what_ends_between_two_questions_is_found_ended(bench: Bench) -> None:
    bench.other.write_now(begun())
    bench.store.before_claim = lambda: bench.other.write_now([Ended(ended())])
    assert await bench.find() == ended()
    assert bench.store.asked == ["get", "claim", "get"]


async def test_what_is_over_before_the_asker_gets_its_turn_is_looked_for_again(bench: Bench) -> None:
    bench.other.write_now(begun())
    bench.clock.mono_s += LEASE_S
    sessions, adopt = bench.context.sessions, bench.context.sessions.adopt

    def adopt_what_ends_at_once(unfinished: Unfinished) -> Running:
        running = adopt(unfinished)
        sessions.cancel(running)
        bench.context.keeper.journal.committed(bench.store.write_now(_waiting(bench.context)))
        return running

    sessions.adopt = adopt_what_ends_at_once  # type: ignore[method-assign]
    bench.context.keeper.journal._commit = lambda batch: None
    found = await bench.find()
    assert isinstance(found, StoredResponse)
    assert (found.end.status, found.ids) == ("cancelled", [100])
    assert bench.store.asked == ["get", "claim", "get"]


def _waiting(context: Context) -> list[Began | Ended]:
    return [waiting.entry for waiting in context.keeper.journal._writing]  # type: ignore[misc]


async def test_what_another_router_holds_is_there(bench: Bench) -> None:
    bench.other.write_now(begun())
    assert await bench.find() == Elsewhere("u")
    with pytest.raises(RouterUnreachable, match="'u'"):
        await bench.context.finder.find_here(TENANT, ID)


@pytest.mark.parametrize("owner", ["x", "t"])
async def test_what_a_router_holds_that_cannot_be_asked_can_be_had_later(bench: Bench, owner: str) -> None:
    """An earlier life of this router holds its responses until its lease is over, too."""
    holder = FakeStore(bench.store.database, owner, "before")
    holder.beat_now(bench.clock.mono_s)
    holder.write_now(begun())
    with pytest.raises(RouterUnreachable, match=repr(owner)) as caught:
        await bench.find()
    assert (caught.value.status, caught.value.retryable) == (503, True)
    assert caught.value.retry_after_s is not None
    bench.clock.mono_s += LEASE_S
    assert isinstance(await bench.find(), Running)


@pytest.mark.parametrize("response_id", ["resp_u_0", "resp_v_ab12"])
async def test_an_unknown_id_is_asked_for_where_it_was_made(bench: Bench, response_id: str) -> None:
    assert await bench.find(response_id) == Elsewhere(response_id[5])
    with pytest.raises(ResponseNotFound):
        await bench.context.finder.find_here(TENANT, response_id)


# fmt: off
STRANGE = [
    "", "resp", "resp_u", "resp_u_", "resp__0", "resp_t_0", "resp_x_0", "resp_U_0", "resp_u_0_1", "resp_u_0\n", "u",
    "chatcmpl_u_0", "resp_../u_0", "resp_u/../v_0", "resp_u?_0", "resp_u_0?x=1", "resp_u_0/cancel", "resp_u#_0",
    "resp_u@v_0", "resp_u:1_0", "resp_%75_0", "resp_\u00fc_0", "resp_u_\u0664", "resp_" + "u" * 10_000 + "_0", "\0",
]
# fmt: on


@pytest.mark.parametrize("response_id", STRANGE)
async def test_an_id_that_names_no_registered_router_is_unknown(bench: Bench, response_id: str) -> None:
    with pytest.raises(ResponseNotFound) as caught:
        await bench.find(response_id)
    assert caught.value.param == "response_id"
    assert await bench.context.finder.record(TENANT, response_id) is None


async def test_another_tenant_finds_what_it_would_find_if_there_were_nothing(bench: Bench) -> None:
    bench.other.write_now([*begun(), Ended(ended(record_as("resp_t_2")))])
    bench.context.sessions.adopt(Unfinished(record_as("resp_t_3"), record().request.input))
    for response_id in (ID, "resp_t_2", "resp_t_3", "resp_t_4"):
        with pytest.raises(ResponseNotFound):
            await bench.find(response_id, "other")
        with pytest.raises(ResponseNotFound):
            await bench.context.finder.find_here("other", response_id)
        assert await bench.context.finder.record("other", response_id) is None


def record_as(response_id: str, **changes: object) -> RequestRecord:
    made = record(**changes)
    return RequestRecord(
        id=response_id,
        tenant=made.tenant,
        created_at=made.created_at,
        seed=made.seed,
        release=made.release,
        request=made.request,
    )


async def test_what_runs_unstored_is_not_found(bench: Bench) -> None:
    bench.context.sessions.warm_up(record(store=True), Whole())
    adopted = bench.context.sessions.adopt(Unfinished(record_as("resp_t_5", store=False), []))
    assert bench.context.sessions.find(TENANT, "resp_t_5") is adopted
    with pytest.raises(ResponseNotFound):
        await bench.find("resp_t_5")


async def test_a_previous_response_is_a_finished_one_and_looking_for_it_takes_nothing_over(bench: Bench) -> None:
    bench.other.write_now(begun())
    bench.clock.mono_s += LEASE_S
    finder = bench.context.finder
    assert await finder.record(TENANT, ID) is None
    assert (bench.store.asked, bench.adopted()) == (["get"], 0)
    await bench.find()
    assert await finder.record(TENANT, ID) is None, "it runs here"
    bench.other.write_now([Ended(ended(record_as("resp_t_2")))])
    assert await finder.record(TENANT, "resp_t_2") == ended(record_as("resp_t_2"))
    with pytest.raises(RouterUnreachable):
        await finder.record(TENANT, "resp_u_0")
    bench.context.sessions.adopt(Unfinished(record_as("resp_u_1"), record().request.input))
    assert await finder.record(TENANT, "resp_u_1") is None, "it runs here now, whoever made it"


async def test_a_store_that_is_down_is_no_proof_that_there_is_nothing(bench: Bench) -> None:
    bench.store.down = True
    for asking in (bench.find(), bench.find("resp_u_0"), bench.context.finder.record(TENANT, ID)):
        with pytest.raises(StoreUnavailable) as caught:
            await asking
        assert isinstance(caught.value, EdgechatError)
        assert "memory" not in caught.value.message, "where the store is, is for the log"
    bench.store.down = False


async def test_a_router_that_stops_takes_nothing_over(bench: Bench) -> None:
    bench.store.write_now(begun())
    bench.context.sessions.suspend()
    with pytest.raises(Draining):
        await bench.find()
    with pytest.raises(Draining):
        bench.context.sessions.adopt(Unfinished(record(), record().request.input))
    assert (len(bench.context.sessions), bench.adopted()) == (0, 0)


async def test_what_was_taken_over_before_any_node_was_there_waits_for_the_first_and_fifteen_seconds_more(
    bench: Bench,
) -> None:
    sessions = bench.context.sessions
    running = sessions.adopt(Unfinished(record(), record().request.input))
    reader = Whole()
    sessions.join(running, reader)
    for _ in range(20):
        bench.clock.mono_s += 5.0
        sessions.on_tick()
    assert not running.over.is_set()
    other = bench.links.node("other", releases=("another@0123456789ab",))
    other.come_up()
    bench.clock.mono_s += 14.0
    other.status()
    sessions.on_tick()
    assert not running.over.is_set()
    bench.clock.mono_s += 1.0
    sessions.on_tick()
    await running.over.wait()
    with pytest.raises(EdgechatError) as failed:
        await reader.response()
    assert failed.value.code == "no_node_available"


async def test_a_router_that_stood_still_blames_nobody(bench: Bench) -> None:
    node = bench.links.node("eu")
    node.come_up()
    bench.clock.mono_s += 24.0
    bench.context.forgive(24.0)
    assert [known.hello.name for known in bench.context.fleet.ready(bench.clock.mono_s)] == ["eu"]
    bench.clock.mono_s += 2.0
    assert bench.context.fleet.ready(bench.clock.mono_s) == []
