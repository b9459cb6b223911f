from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.conversation import Item
from core.errors import StoreUnavailable
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Logprobs, Text, Usage
from core.stream import EndRecord, Failure, Request, RequestRecord, replay
from router.store import sqlite as store_module
from router.journal import StoredResponse
from router.store.sqlite import ResponseStore

SECRET_TEXT = "a sentence that belongs in no log"


def response(response_id: str = "resp_r_1", tenant: str = "acme", created_at: int = 1_700_000_000) -> StoredResponse:
    request = Request(
        model="m",
        input=[Item("message", "user", SECRET_TEXT), Item("message", "assistant", "b", [1, 2], "m@0")],
        temperature=0.7,
        top_p=0.9,
        max_output_tokens=64,
        previous_response_id="resp_r_0",
        reasoning={"effort": "low"},
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object", "required": ["x"]}}],
        metadata={"k": "v"},
    )
    record = RequestRecord(
        id=response_id, tenant=tenant, created_at=created_at, seed=2**63 + 5, release="m@0", request=request
    )
    deltas: list[list[Delta]] = [
        [ItemStart("message", "final_answer"), Text("héllo 你好 🙂"), Logprobs(-0.5, [(1, -0.5)])],
        [ItemEnd(), ItemStart("function_call", name="f")],
        [Arguments('{"x":1}')],
        [ItemEnd()],
    ]
    failure = Failure("node_lost", "The node was lost.", True)
    end = EndRecord(status="failed", completed_at=created_at + 1, error=failure, usage=Usage(5, 4, 3))
    return StoredResponse(record, [7, 8, 9, 10], deltas, end)


@contextlib.asynccontextmanager
async def opened(path: Path, keep_s: float | None = None) -> AsyncIterator[ResponseStore]:
    store = await ResponseStore.open(path, keep_s=keep_s)
    try:
        yield store
    finally:
        await store.close()


async def test_what_was_put_comes_back_equal_and_replays_the_same_events(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response())
        back = await store.get("acme", "resp_r_1")
    assert back == response()
    assert back is not None
    assert replay(back.record, back.deltas, back.end) == replay(response().record, response().deltas, response().end)


async def test_it_is_still_there_after_the_store_was_closed_and_opened(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.put(response())
    async with opened(path) as store:
        assert await store.get("acme", "resp_r_1") == response()


async def test_a_second_process_sees_a_put_as_soon_as_it_returned(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.put(response())
        with contextlib.closing(sqlite3.connect(path)) as other:
            rows = other.execute("SELECT tenant, id, created_at, previous_id FROM responses").fetchall()
    assert rows == [("acme", "resp_r_1", 1_700_000_000, "resp_r_0")]


async def test_another_tenant_neither_reads_nor_deletes_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response())
        assert await store.get("rival", "resp_r_1") is None
        assert not await store.delete("rival", "resp_r_1")
        assert await store.get("acme", "resp_r_1") == response()


async def test_two_tenants_may_hold_the_same_id(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response(tenant="a", created_at=1))
        await store.put(response(tenant="b", created_at=2))
        assert await store.get("a", "resp_r_1") == response(tenant="a", created_at=1)
        assert await store.delete("a", "resp_r_1")
        assert await store.get("b", "resp_r_1") == response(tenant="b", created_at=2)


async def test_a_response_is_deleted_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response())
        assert await store.delete("acme", "resp_r_1")
        assert await store.get("acme", "resp_r_1") is None
        assert not await store.delete("acme", "resp_r_1")


async def test_the_same_id_put_again_takes_its_place(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response())
        await store.put(response(created_at=5))
        assert await store.get("acme", "resp_r_1") == response(created_at=5)


async def test_files_are_readable_by_their_owner_only_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "s.sqlite"
    async with opened(path) as store:
        await store.put(response())
        files = list(path.parent.iterdir())
        assert path in files
        assert len(files) > 1, "the write-ahead log lies beside it"
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.touch(0o644)
    async with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_close_finishes_every_put_that_was_accepted(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = await ResponseStore.open(path)
    puts = [asyncio.create_task(store.put(response(f"resp_r_{number}"))) for number in range(200)]
    await asyncio.sleep(0)
    for put in puts:
        put.cancel()
    await store.close()
    async with opened(path) as store:
        assert [await store.get("acme", f"resp_r_{number}") is None for number in range(200)] == [False] * 200


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = await ResponseStore.open(tmp_path / "s.sqlite")
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable, match="is closed"):
        await store.put(response())


async def test_a_store_that_is_too_far_behind_refuses_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_WAITING", 4)
    async with opened(tmp_path / "s.sqlite") as store:
        go_on = threading.Event()
        blocked = store._thread.submit(go_on.wait)
        waiting = [asyncio.create_task(store.get("acme", "x")) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="4 calls behind") as refused:
            await store.put(response())
        assert refused.value.retryable
        assert refused.value.retry_after_s is not None
        go_on.set()
        assert blocked.result()
        assert await asyncio.gather(*waiting) == [None] * 4
        await store.put(response())


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.put(response())
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(StoreUnavailable, match="has schema 2, this router reads 1"):
        await ResponseStore.open(path)
    assert path.read_bytes() == before


async def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE pets (name TEXT)")
    with pytest.raises(StoreUnavailable, match="something else"):
        await ResponseStore.open(path)


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"this is no database " * 500)
    with pytest.raises(StoreUnavailable, match=r"s\.sqlite cannot be used: file is not a database"):
        await ResponseStore.open(path)


@pytest.mark.parametrize(("place", "reason"), [("file/s.sqlite", "exists"), ("", "Is a directory")])
async def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match=reason):
        await ResponseStore.open(tmp_path / place)


async def test_a_full_disk_is_a_retryable_sentence_and_reading_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response())
        await store._run(lambda: store._connection.execute("PRAGMA max_page_count = 1").fetchall())
        big = StoredResponse(response("resp_r_2").record, [1], [[Text(SECRET_TEXT * 10_000)]], response().end)
        with pytest.raises(StoreUnavailable, match="database or disk is full") as refused:
            await store.put(big)
        assert (refused.value.code, refused.value.status, refused.value.retryable) == ("store_unavailable", 503, True)
        assert await store.get("acme", "resp_r_2") is None
        assert await store.get("acme", "resp_r_1") == response()
        assert SECRET_TEXT not in str(refused.value) + caplog.text


async def test_a_value_that_cannot_be_kept_is_refused_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        odd = StoredResponse(response().record, [2**70], [[]], response().end)
        with pytest.raises(StoreUnavailable, match="cannot hold"):
            await store.put(odd)
        await store.put(response())


async def test_a_damaged_row_is_an_error_not_an_unknown_response(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.put(response())
        await store._run(lambda: store._connection.execute("UPDATE responses SET payload = x'c1'").fetchall())
        with pytest.raises(StoreUnavailable, match="cannot hold or read"):
            await store.get("acme", "resp_r_1")


async def test_responses_past_their_time_are_forgotten(tmp_path: Path) -> None:
    path, now = tmp_path / "s.sqlite", 1 << 40
    async with opened(path) as store:
        await store.put(response("resp_old", created_at=1))
        await store.put(response("resp_new", created_at=now))
    async with opened(path, keep_s=3600) as store:
        assert await store.get("acme", "resp_old") is None
        assert await store.get("acme", "resp_new") is not None
        await store.put(response("resp_late", created_at=2))
        assert await store.get("acme", "resp_late") is None


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_store_whose_file_was_taken_away_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.put(response("resp_r_1"))
        for file in tmp_path.iterdir():
            file.unlink()
        if replaced:
            path.touch()
        await store.put(response("resp_r_2"))
        assert await store.get("acme", "resp_r_1") is None
    assert "removed or replaced" in caplog.text
    async with opened(path) as store:
        assert await store.get("acme", "resp_r_2") == response("resp_r_2")
