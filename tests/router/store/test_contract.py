"""What router/journal promises of a store: in memory, in SQLite and in Redis alike."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import pytest

from core.conversation import Item
from core.errors import StoreUnavailable
from core.frames import Text
from core.stream import replay
from router.journal import EPOCHS_PER_OWNER, Began, Dropped, Ended, Entry, Outcome, Owned, Said, Store, Unfinished
from tests.fake_store import FakeDatabase, FakeStore
from tests.router.store.conftest import Place
from tests.router.store.entries import (
    CREATED_AT,
    PLACED,
    SECRET_TEXT,
    began,
    begun,
    ended,
    read,
    record,
    response,
    said,
    saying,
)

DAY_S = 86_400.0


def claimed(found: Unfinished | Owned | None) -> Unfinished:
    assert isinstance(found, Unfinished)
    return found


# -- what is written is there --------------------------------------------------------------------


async def test_a_finished_response_comes_back_equal_and_replays_the_same_events(place: Place) -> None:
    store = await place.open()
    assert await store.write([began(), read(), said(0, 7, 8), said(2, 9), ended()]) == ["kept"] * 5
    back = await store.get("acme", "resp_r_1")
    assert back == response()
    assert back is not None
    assert replay(back.record, back.deltas, back.end) == replay(response().record, response().deltas, response().end)


async def test_what_was_said_of_an_unfinished_response_is_claimed_in_order_in_a_later_epoch(place: Place) -> None:
    store = await place.open()
    assert await store.write([began(), read(), said(0, 7)]) == ["kept"] * 3
    assert await store.write([said(1, 8, 9), said(3), said(3, 10)]) == ["kept"] * 3
    await place.die(store)
    heir = await place.open("b")
    assert await heir.claim("acme", "resp_r_1") == msgspec.structs.replace(
        begun(),
        epoch=EPOCHS_PER_OWNER,
        placed=PLACED,
        ids=[7, 8, 9, 10],
        deltas=[[Text(f"word {number}")] for number in (7, 8, 9, 10)],
    )


async def test_a_response_may_begin_with_what_an_earlier_journal_has(place: Place) -> None:
    store = await place.open()
    opening = msgspec.structs.replace(begun(), epoch=3, placed=PLACED, ids=[1, 2], deltas=[[Text("a")], []])
    assert await store.write([Began(opening), said(0, 5), said(2, 5)]) == ["kept", "refused", "kept"]
    found = claimed(await store.claim("acme", "resp_r_1"))
    assert (found.epoch, found.placed, found.ids) == (3 + EPOCHS_PER_OWNER, PLACED, [1, 2, 5])
    assert found.deltas == [[Text("a")], [], [Text("word 5")]]


async def test_an_unfinished_response_is_not_got_and_a_finished_one_not_claimed(place: Place) -> None:
    store = await place.open()
    await store.write([began(), said(0, 7)])
    assert await store.get("acme", "resp_r_1") is None
    await store.write([ended()])
    assert await store.claim("acme", "resp_r_1") is None
    assert await store.unclaimed() == []


async def test_an_end_needs_no_beginning(place: Place) -> None:
    store = await place.open()
    assert await store.write([ended()]) == ["kept"]
    assert await store.get("acme", "resp_r_1") == response()


async def test_an_empty_batch_is_written(place: Place) -> None:
    assert await (await place.open()).write([]) == []


async def test_what_was_dropped_is_gone_and_may_never_have_been(place: Place) -> None:
    store = await place.open()
    assert await store.write([began(), said(0, 7), Dropped("resp_r_1"), Dropped("resp_r_2")]) == ["kept"] * 4
    assert await store.claim("acme", "resp_r_1") is None
    assert await store.unclaimed() == []
    assert await store.write([said(1, 8)]) == ["lost"]


# -- entries that are out of order ---------------------------------------------------------------


@pytest.mark.parametrize("before", [[began()], [began(), said(0, 1)], [ended()]])
async def test_an_id_is_used_once(place: Place, before: list[Entry]) -> None:
    store = await place.open()
    await store.write(before)
    assert await store.write([began()]) == ["refused"]


async def test_a_response_ends_once(place: Place) -> None:
    store = await place.open()
    assert await store.write([ended(), Ended(saying("other"))]) == ["kept", "refused"]
    assert await store.get("acme", "resp_r_1") == response()


async def test_ids_are_written_once_each_and_without_a_gap(place: Place) -> None:
    store = await place.open()
    entries: list[Entry] = [began(), said(1, 5), said(0, 1, 2), said(1, 9), said(3, 9), said(2, 3)]
    assert await store.write(entries) == ["kept", "refused", "kept", "refused", "refused", "kept"]
    assert claimed(await store.claim("acme", "resp_r_1")).ids == [1, 2, 3]


async def test_what_is_written_in_one_go_may_be_large(place: Place) -> None:
    store = await place.open()
    entries: list[Entry] = []
    for number in range(4):
        name = f"resp_{number}"
        large = said(0, 1, response_id=name, text="x" * 1_500_000)
        entries += [began(name), large, said(1, 2, response_id=name)]
    entries += [Ended(saying("y", "resp_0", times=9_000_000)), Dropped("resp_1")]
    assert await store.write(entries) == ["kept"] * len(entries)
    back = await store.get("acme", "resp_0")
    assert back == saying("y", "resp_0", times=9_000_000)
    assert await store.claim("acme", "resp_1") is None
    assert [claimed(await store.claim("acme", f"resp_{number}")).ids for number in (2, 3)] == [[1, 2], [1, 2]]


async def test_nothing_is_said_of_what_never_began(place: Place) -> None:
    store = await place.open()
    assert await store.write([said(0, 1), read()]) == ["lost", "lost"]
    assert await store.claim("acme", "resp_r_1") is None


@pytest.mark.parametrize(
    "odd",
    [
        Said("resp_r_1", 0, [1], [[Text("\ud800")]]),
        Said("resp_r_1", 0, [2**70], [[]]),
        Began(begun("resp_\udfff")),
        Began(begun("resp_r_2", "\udfff")),
        Began(msgspec.structs.replace(begun("resp_r_2"), items=[Item("message", "user", "\ud800")])),
        Began(begun("resp_r_2", created_at=2**60)),
        Ended(saying("\ud800", "resp_r_2")),
        Ended(response("resp_r_2", created_at=-(2**63))),
        Dropped("\ud800"),
    ],
    ids=["text", "number", "id", "tenant", "item", "time", "response", "past", "name"],
)
async def test_an_entry_that_cannot_be_written_is_refused_alone(
    place: Place, odd: Entry, caplog: pytest.LogCaptureFixture
) -> None:
    store = await place.open()
    entries: list[Entry] = [began(), odd, said(0, 7), ended("resp_r_3")]
    assert await store.write(entries) == ["kept", "refused", "kept", "kept"]
    assert claimed(await store.claim("acme", "resp_r_1")).ids == [7]
    assert await store.get("acme", "resp_r_2") is None
    assert await store.get("acme", "resp_r_3") is not None
    assert SECRET_TEXT not in caplog.text


async def test_what_follows_a_refused_entry_is_not_kept_behind_a_gap(place: Place) -> None:
    store = await place.open()
    entries: list[Entry] = [began(), said(0, 1), Said("resp_r_1", 1, [2], [[Text("\ud800")]]), said(2, 3)]
    assert await store.write(entries) == ["kept", "kept", "refused", "refused"]
    assert claimed(await store.claim("acme", "resp_r_1")).ids == [1]


# -- whose it is -----------------------------------------------------------------------------------


async def test_another_tenants_response_is_as_unknown_as_one_that_never_was(place: Place) -> None:
    store = await place.open()
    await store.write([ended("resp_r_1"), began("resp_r_2")])
    for tenant in ("rival", "", "acme:resp_r_1", "4:acme", "\ud800"):
        for response_id in ("resp_r_1", "resp_r_2", "acme:resp_r_1", "\ud800"):
            assert await store.get(tenant, response_id) is None
            assert await store.claim(tenant, response_id) is None
            assert not await store.delete(tenant, response_id)
    assert await store.get("acme", "resp_r_1") == response("resp_r_1")
    assert claimed(await store.claim("acme", "resp_r_2")).record == record("resp_r_2")


async def test_names_that_look_like_each_other_are_two(place: Place) -> None:
    store = await place.open()
    assert await store.write([ended("c", "a:b"), ended("b:c", "a")]) == ["kept", "kept"]
    assert await store.get("a:b", "c") == response("c", "a:b")
    assert await store.get("a", "b:c") == response("b:c", "a")


async def test_two_tenants_may_have_finished_the_same_id(place: Place) -> None:
    store = await place.open()
    assert await store.write([ended(tenant="a"), ended(tenant="b")]) == ["kept", "kept"]
    assert await store.delete("a", "resp_r_1")
    assert await store.get("b", "resp_r_1") == response(tenant="b")


async def test_a_running_response_is_not_ended_for_another_tenant(place: Place) -> None:
    store = await place.open()
    assert await store.write([began(), ended(tenant="rival")]) == ["kept", "refused"]
    assert claimed(await store.claim("acme", "resp_r_1")).record == record()


async def test_what_a_dead_router_left_is_listed_and_claimed_once(place: Place) -> None:
    dead = await place.open("a")
    await dead.write([began("resp_2", "x", created_at=2), began("resp_1", "y", created_at=1), ended("resp_3")])
    await place.die(dead)
    heir = await place.open("b")
    assert await heir.unclaimed() == [("y", "resp_1"), ("x", "resp_2")]
    assert claimed(await heir.claim("y", "resp_1")).epoch == EPOCHS_PER_OWNER
    assert await heir.write([said(0, 1, response_id="resp_1"), said(0, 1, response_id="resp_2")]) == ["kept", "lost"]


async def test_what_a_router_began_before_it_was_started_again_is_its_own_to_claim(place: Place) -> None:
    before = await place.open("a", "1")
    await before.write([began(), said(0, 4)])
    await place.die(before)
    after = await place.open("a", "2")
    assert await after.write([said(1, 5)]) == ["lost"]
    assert claimed(await after.claim("acme", "resp_r_1")).ids == [4]
    assert await after.write([said(1, 5)]) == ["kept"]


async def test_a_router_claims_its_own_with_epochs_that_were_never_used(place: Place) -> None:
    store = await place.open()
    await store.write([began()])
    assert await store.unclaimed() == [("acme", "resp_r_1")]
    epochs = [claimed(await store.claim("acme", "resp_r_1")).epoch for _ in range(3)]
    assert epochs == [EPOCHS_PER_OWNER, 2 * EPOCHS_PER_OWNER, 3 * EPOCHS_PER_OWNER]
    assert await store.write([said(0, 1), ended()]) == ["kept", "kept"]


async def test_what_others_left_is_listed_before_ones_own_and_at_most_256_of_it(place: Place) -> None:
    dead = await place.open("a")
    await dead.write([began(f"resp_dead_{number:03}", created_at=1000 - number) for number in range(300)])
    await place.die(dead)
    store = await place.open("b")
    left = [f"resp_dead_{number:03}" for number in reversed(range(300))]
    assert [response_id for _, response_id in await store.unclaimed()] == left[:256]
    for response_id in left[:100]:
        assert claimed(await store.claim("acme", response_id))
    assert [response_id for _, response_id in await store.unclaimed()] == left[100:] + left[:100]


async def test_what_a_router_answers_does_not_hide_what_it_could_go_on_with(place: Place) -> None:
    """As after a moment in which the store took nothing: all of it is this router's own, and some must be claimed."""
    store = await place.open()
    ids = [f"resp_{number:03}" for number in range(600)]
    await store.write([began(response_id, created_at=number) for number, response_id in enumerate(ids)])
    assert [response_id for _, response_id in await store.unclaimed()] == ids


async def test_a_response_deleted_while_it_runs_is_lost_to_its_router(place: Place) -> None:
    store = await place.open()
    await store.write([began(), said(0, 1)])
    assert await store.delete("acme", "resp_r_1")
    assert await store.write([said(1, 2), ended()]) == ["lost", "lost"]
    assert await store.write([ended()]) == ["lost"]
    assert await store.get("acme", "resp_r_1") is None
    assert await store.unclaimed() == []


@pytest.mark.parametrize("finished", [True, False])
async def test_a_response_is_deleted_once(place: Place, finished: bool) -> None:
    store = await place.open()
    await store.write([began(), read(), said(0, 1), *([ended()] if finished else [])])
    assert await store.delete("acme", "resp_r_1")
    assert not await store.delete("acme", "resp_r_1")
    assert await store.get("acme", "resp_r_1") is None
    assert await store.claim("acme", "resp_r_1") is None


# -- several routers on one database ---------------------------------------------------------------


together = pytest.mark.parametrize("place", ["memory", "redis"], indirect=True)


async def sharing(place: Place, *names: str) -> list[Store]:
    assert place.shared
    return [await place.open(name) for name in names]


@together
async def test_what_a_living_router_answers_is_owned_by_it(place: Place) -> None:
    alive, other = await sharing(place, "alive", "other")
    await alive.write([began()])
    assert await other.claim("acme", "resp_r_1") == Owned("alive")
    assert await other.claim("rival", "resp_r_1") is None
    assert await other.unclaimed() == []
    assert await other.write([read(), said(0, 1), ended(), Dropped("resp_r_1")]) == ["lost"] * 4
    assert await alive.write([said(0, 1), ended()]) == ["kept", "kept"]
    assert await other.get("acme", "resp_r_1") == response()


@together
async def test_an_owner_that_comes_back_after_its_response_was_claimed_writes_nothing_any_more(place: Place) -> None:
    frozen, heir = await sharing(place, "frozen", "heir")
    await frozen.write([began(), said(0, 1)])
    await place.die(frozen)
    assert claimed(await heir.claim("acme", "resp_r_1")).ids == [1]
    assert await frozen.write([said(1, 2), read(), ended(), Dropped("resp_r_1")]) == ["lost"] * 4
    await frozen.beat()
    assert await frozen.claim("acme", "resp_r_1") == Owned("heir")
    assert await heir.write([said(1, 9)]) == ["kept"]
    await place.die(heir)
    assert claimed(await frozen.claim("acme", "resp_r_1")).ids == [1, 9]


@together
async def test_an_old_owners_end_does_not_replace_the_heirs(place: Place) -> None:
    frozen, heir = await sharing(place, "frozen", "heir")
    await frozen.write([began()])
    await place.die(frozen)
    await heir.claim("acme", "resp_r_1")
    assert await heir.write([ended()]) == ["kept"]
    assert await frozen.write([Ended(saying("other"))]) == ["lost"]
    assert await heir.get("acme", "resp_r_1") == response()


@together
async def test_of_two_that_claim_at_once_one_wins(place: Place) -> None:
    dead, left, right = await sharing(place, "dead", "left", "right")
    ids = [f"resp_{number}" for number in range(20)]
    await dead.write([began(response_id) for response_id in ids])
    await place.die(dead)
    for response_id in ids:
        found = await asyncio.gather(left.claim("acme", response_id), right.claim("acme", response_id))
        (winner,) = [side for side, one in enumerate(found) if isinstance(one, Unfinished)]
        assert found[1 - winner] == Owned(("left", "right")[winner])
        kept = await asyncio.gather(*(side.write([said(0, 1, response_id=response_id)]) for side in (left, right)))
        assert kept[winner] == ["kept"]
        assert kept[1 - winner] == ["lost"]


@together
async def test_what_a_router_releases_may_be_claimed_at_once(place: Place) -> None:
    leaving, heir = await sharing(place, "leaving", "heir")
    await leaving.write([began()])
    await leaving.release()
    assert await heir.unclaimed() == [("acme", "resp_r_1")]
    assert claimed(await heir.claim("acme", "resp_r_1")).epoch == EPOCHS_PER_OWNER
    await heir.release()
    assert claimed(await leaving.claim("acme", "resp_r_1")).epoch == 2 * EPOCHS_PER_OWNER


@together
async def test_a_response_deleted_through_one_router_is_lost_to_the_other(place: Place) -> None:
    owner, other = await sharing(place, "owner", "other")
    await owner.write([began(), said(0, 1)])
    assert await other.delete("acme", "resp_r_1")
    assert await owner.write([said(1, 2), ended()]) == ["lost", "lost"]


# -- how long it stays -------------------------------------------------------------------------------


async def test_a_finished_response_past_its_age_is_forgotten_and_a_running_one_is_not(place: Place) -> None:
    store = await place.open(keep_s=DAY_S)
    await store.write([ended("resp_old"), began("resp_running")])
    place.wall.now += DAY_S
    await store.write([ended("resp_new", created_at=int(place.wall.now))])
    assert await store.get("acme", "resp_old") is not None
    place.wall.now += 1
    assert await store.get("acme", "resp_old") is None
    await store.beat()
    assert not await store.delete("acme", "resp_old")
    assert await store.get("acme", "resp_new") is not None
    assert claimed(await store.claim("acme", "resp_running")).record.id == "resp_running"


async def test_the_oldest_go_when_the_rest_would_not_fit(place: Place) -> None:
    store = await place.open(max_bytes=12_000)
    for number in range(12):
        one = saying("x", f"resp_{number:02}", times=1900)
        older_first = msgspec.structs.replace(one.record, created_at=CREATED_AT + number)
        assert await store.write([Ended(msgspec.structs.replace(one, record=older_first))]) == ["kept"]
    there = [number for number in range(12) if await store.get("acme", f"resp_{number:02}") is not None]
    assert there == [8, 9, 10, 11]
    assert await store.delete("acme", "resp_10")
    await store.write([Ended(saying("x", "resp_last", times=1900))])
    assert await store.get("acme", "resp_08") is not None, "what was deleted has made room"


async def test_one_response_that_is_larger_than_the_bound_is_kept_until_the_next(place: Place) -> None:
    store = await place.open(max_bytes=5_000)
    big = saying("x", "resp_big", times=6_000)
    assert await store.write([Ended(big)]) == ["kept"]
    assert await store.get("acme", "resp_big") == big
    await store.write([ended("resp_next", created_at=CREATED_AT + 1)])
    assert await store.get("acme", "resp_big") is None
    assert await store.get("acme", "resp_next") is not None


async def test_what_no_longer_fits_at_once_is_forgotten_beat_by_beat(place: Place) -> None:
    store = await place.open()
    await store.write([ended(f"resp_{number:03}", created_at=CREATED_AT + number) for number in range(200)])
    await place.die(store)
    strict = await place.open("b", max_bytes=2_000)
    for _ in range(3):
        await strict.beat()
    there = [number for number in range(200) if await strict.get("acme", f"resp_{number:03}") is not None]
    assert there
    assert there == list(range(200 - len(there), 200))
    assert len(there) < 10


# -- when it fails -----------------------------------------------------------------------------------


async def test_a_store_that_cannot_write_says_so_in_a_sentence_and_then_works_again(place: Place) -> None:
    store = await place.open()
    await store.write([began()])
    await place.break_down()
    with pytest.raises(StoreUnavailable) as refused:
        await store.write([said(0, 1), ended("resp_r_2")])
    assert (refused.value.code, refused.value.retryable) == ("store_unavailable", True)
    assert refused.value.message.count("\n") == 0
    assert refused.value.message.endswith(".")
    await place.mend()
    assert await store.get("acme", "resp_r_2") is None
    found = claimed(await store.claim("acme", "resp_r_1"))
    assert found.ids == []
    assert await store.write([said(0, 1), ended("resp_r_2"), ended()]) == ["kept"] * 3


async def test_a_closed_store_takes_nothing(place: Place) -> None:
    store = await place.open()
    await store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.write([began()]),
        lambda: store.get("acme", "resp_r_1"),
        store.unclaimed,
        store.beat,
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await call()  # type: ignore[misc]


# -- everything at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_a_random_history_has_the_outcomes_of_the_store_in_memory(place: Place, seed: int) -> None:
    """Two routers where they can share, else one; they die, come back under a new name and claim."""
    chance = random.Random(seed)
    now = 0.0
    model_database = FakeDatabase(clock=lambda: now, wall=place.wall)
    count = 2 if place.shared else 1
    instance = 0

    async def opened(side: int) -> tuple[Store, FakeStore]:
        nonlocal instance
        instance += 1
        name = f"{'ab'[side]}"
        store = await place.open(name, str(instance))
        model = FakeStore(model_database, name, str(instance))
        model.beat_now(now)
        return store, model

    pairs = [await opened(side) for side in range(count)]
    ids = [f"resp_{number}" for number in range(5)]
    seen: set[Outcome] = set()
    for _ in range(150):
        side = chance.randrange(count)
        store, model = pairs[side]
        match chance.choice(["write"] * 6 + ["claim"] * 2 + ["get", "delete", "die", "list"]):
            case "write":
                batch = [_any_entry(chance, model_database, ids) for _ in range(chance.randint(1, 6))]
                outcomes = await store.write(batch)
                assert outcomes == model.write_now(batch), batch
                seen.update(outcomes)
            case "claim":
                response_id = chance.choice(ids)
                assert await store.claim("acme", response_id) == model.claim_now("acme", response_id)
            case "get":
                response_id = chance.choice(ids)
                assert await store.get("acme", response_id) == model.get_now("acme", response_id)
            case "delete":
                response_id = chance.choice(ids)
                assert await store.delete("acme", response_id) == model.delete_now("acme", response_id)
            case "list":
                assert await store.unclaimed() == model.unclaimed_now()
            case "die":
                await place.die(store)
                model.release_now()
                pairs[side] = await opened(side)
    assert seen == {"kept", "lost", "refused"}


def _any_entry(chance: random.Random, database: FakeDatabase, ids: list[str]) -> Entry:
    response_id = chance.choice(ids)
    row = database.running.get(response_id)
    match chance.choice(["began"] * 3 + ["said"] * 6 + ["read", "ended", "dropped"]):
        case "began":
            return began(response_id, created_at=chance.randrange(100))
        case "said":
            seq = (row.count if row else 0) + chance.choice([0, 0, 0, 0, -1, 1])
            return said(seq, *(chance.randrange(1000) for _ in range(chance.randint(1, 3))), response_id=response_id)
        case "read":
            return read(response_id)
        case "ended":
            return ended(response_id)
        case _:
            return Dropped(response_id)
