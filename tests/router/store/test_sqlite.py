"""What is SQLite's own: the file, its lock, its thread, its schema, and what is left of what was deleted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from core.conversation import Item
from core.errors import StoreUnavailable
from router.journal import EPOCHS_PER_OWNER, Began, Dropped, Ended, Unfinished
from router.store import sqlite as store_module
from router.store.sqlite import BEATS_PER_SCRUB, SqliteStore, _Urgency
from tests.router.store.entries import SCHEMA_1, SECRET_TEXT, began, ended, on_disk, read, response, said, saying

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[3]


@contextlib.asynccontextmanager
async def opened(path: Path, **settings: float) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(path, "a", "1", **settings)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()


async def run(store: SqliteStore, statement: str) -> None:
    await store._run(lambda: store._connection.execute(statement).fetchall(), _Urgency.READ)


# -- the file ----------------------------------------------------------------------------------------


async def test_a_second_process_sees_a_response_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended()])
        with contextlib.closing(sqlite3.connect(path)) as other:
            rows = other.execute("SELECT tenant, id, created_at, previous_id FROM responses").fetchall()
    assert rows == [("acme", "resp_r_1", 1_700_000_000, "resp_r_0")]


async def test_it_is_still_there_after_the_store_was_closed_and_opened(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended(), began("resp_r_2"), said(0, 1, response_id="resp_r_2")])
    async with opened(path) as store:
        assert await store.get("acme", "resp_r_1") == response()
        assert await store.unclaimed() == [("acme", "resp_r_2")]


async def test_files_are_readable_by_their_owner_only_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended()])
        files = list(path.parent.iterdir())
        assert {file.name for file in files} == {"s.sqlite", "s.sqlite-wal", "s.sqlite-shm", "s.sqlite.lock"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.touch(0o644)
    async with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_link_to_a_file_that_is_in_use_is_refused(tmp_path: Path) -> None:
    path, link = tmp_path / "s.sqlite", tmp_path / "link.sqlite"
    async with opened(path):
        link.symlink_to(path)
        with pytest.raises(StoreUnavailable, match="in use by another router"):
            await SqliteStore.open(link, "b", "1")
    async with opened(link) as store:
        assert await store.write([ended()]) == ["kept"]
        assert await store.delete("acme", "resp_r_1")
        assert SECRET_TEXT.encode() not in on_disk(path)


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"this is no database " * 500)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"s\.sqlite cannot be used: file is not a database"):
            await SqliteStore.open(path, "a", "1")


@pytest.mark.parametrize(("place", "reason"), [("file/s.sqlite", "exists"), ("", "Is a directory")])
async def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match=reason):
        await SqliteStore.open(tmp_path / place, "a", "1")


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_store_whose_file_was_taken_away_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended("resp_r_1"), began("resp_r_3")])
        for file in tmp_path.iterdir():
            file.unlink()
        if replaced:
            path.touch()
        assert await store.write([ended("resp_r_2"), ended("resp_r_3")]) == ["kept", "lost"]
        assert await store.get("acme", "resp_r_1") is None
        with pytest.raises(StoreUnavailable, match="in use by another router"):
            await SqliteStore.open(path, "b", "1")
    assert "removed or replaced" in caplog.text
    async with opened(path) as store:
        assert await store.get("acme", "resp_r_2") == response("resp_r_2")


# -- one router a file -------------------------------------------------------------------------------


async def test_a_second_router_is_told_who_uses_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([began()])
        with pytest.raises(StoreUnavailable) as refused:
            await SqliteStore.open(path, "b", "1")
        assert refused.value.message == (
            f"The store {path} is in use by another router (pid {os.getpid()}); "
            "stop that one, or name another file in store.path."
        )
        assert await store.write([said(0, 1)]) == ["kept"]
    async with opened(path) as store:
        assert isinstance(await store.claim("acme", "resp_r_1"), Unfinished)


WRITER = """
import asyncio, sys
from pathlib import Path
from typing import TypeVar
from router.store.sqlite import BEATS_PER_SCRUB, SqliteStore, _Urgency
from tests.router.store.entries import began, said

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]), "a", "1")
    await store.write([began()])
    seq = 0
    while True:
        outcomes = await store.write([said(seq, seq), said(seq + 1, seq + 1)])
        assert outcomes == ["kept", "kept"]
        seq += 2
        print(seq, flush=True)

asyncio.run(main())
"""


async def test_what_was_kept_survives_a_killed_process_and_is_claimed(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer:
        for _ in range(20):
            assert writer.stdout.readline()
        with pytest.raises(StoreUnavailable, match=rf"another router \(pid {writer.pid}\)"):
            await SqliteStore.open(path, "a", "2")
        writer.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in writer.stdout.read().split()]
    async with opened(path) as store:
        assert await store.unclaimed() == [("acme", "resp_r_1")]
        found = await store.claim("acme", "resp_r_1")
    assert isinstance(found, Unfinished)
    assert found.epoch == EPOCHS_PER_OWNER
    assert len(found.ids) >= (acknowledged[-1] if acknowledged else 40)
    assert len(found.ids) % 2 == 0, "a batch is there whole or not at all"
    assert found.ids == list(range(len(found.ids)))


# -- schemas -----------------------------------------------------------------------------------------


async def test_a_file_of_schema_1_is_brought_up_to_date_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    kept = [response(f"resp_{number}", created_at=number) for number in range(4)]
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(SCHEMA_1)
        for one in kept:
            row = (one.record.tenant, one.record.id, one.record.created_at, None, msgspec.msgpack.encode(one))
            old.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", row)
        old.commit()
    async with opened(path) as store:
        assert [await store.get("acme", one.record.id) for one in kept] == kept
        assert await store.write([began("resp_r_9")]) == ["kept"]
        assert await store.delete("acme", "resp_3")
    size = len(msgspec.msgpack.encode(kept[0]))
    async with opened(path, max_bytes=2 * size) as store:
        await store.beat()
        assert await store.get("acme", "resp_0") is None, "what schema 1 held counts"
        assert await store.get("acme", "resp_1") == kept[1]


def looks(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's mode and content."""
    return {file.name: (file.stat().st_mode, file.read_bytes()) for file in folder.iterdir()}


async def test_a_newer_schema_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended()])
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 3")
    before = looks(tmp_path)
    with pytest.raises(StoreUnavailable, match="has schema 3, this router reads 2"):
        await SqliteStore.open(path, "a", "1")
    assert looks(tmp_path) == before


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
async def test_a_database_of_something_else_is_refused_and_left_untouched(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "s.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"PRAGMA journal_mode = {mode}")
        other.execute("CREATE TABLE pets (name TEXT)")
    path.chmod(0o644)
    before = looks(tmp_path)
    assert set(before) == {"s.sqlite"}
    with pytest.raises(StoreUnavailable, match="something else"):
        await SqliteStore.open(path, "a", "1")
    assert looks(tmp_path) == before


async def test_a_database_of_something_else_that_is_in_use_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE pets (name TEXT)")
        before = (path.read_bytes(), (tmp_path / "s.sqlite-wal").read_bytes())
        with pytest.raises(StoreUnavailable, match="something else"):
            await SqliteStore.open(path, "a", "1")
        assert (path.read_bytes(), (tmp_path / "s.sqlite-wal").read_bytes()) == before
        assert not (tmp_path / "s.sqlite.lock").exists()


# -- the thread --------------------------------------------------------------------------------------


async def test_close_finishes_every_write_that_was_accepted(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = await SqliteStore.open(path, "a", "1")
    writes = [asyncio.create_task(store.write([ended(f"resp_r_{number}")])) for number in range(200)]
    await asyncio.sleep(0)
    for write in writes:
        write.cancel()
    await store.close()
    async with opened(path) as store:
        assert [await store.get("acme", f"resp_r_{number}") is None for number in range(200)] == [False] * 200


async def test_a_store_that_hangs_does_not_keep_its_router_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "CLOSE_S", 0.05)
    store = await SqliteStore.open(tmp_path / "s.sqlite", "a", "1")
    go_on = threading.Event()
    hanging = store._thread.submit(0, go_on.wait)
    await store.close()
    assert not hanging.done()
    assert "is left to itself" in caplog.text
    go_on.set()
    while not await _is_free(tmp_path / "s.sqlite"):
        await asyncio.sleep(0.01)


async def _is_free(path: Path) -> bool:
    try:
        await (await SqliteStore.open(path, "b", "1")).close()
    except StoreUnavailable:
        return False
    return True


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "s.sqlite", "a", "1")
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable, match="is closed"):
        await store.write([ended()])


async def test_a_store_that_is_too_far_behind_refuses_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_WAITING", 4)
    async with opened(tmp_path / "s.sqlite") as store:
        go_on = threading.Event()
        blocked = store._thread.submit(0, go_on.wait)
        done: list[str] = []

        async def noted(name: str, call: Awaitable[T]) -> T:
            result = await call
            done.append(name)
            return result

        waiting = [asyncio.create_task(noted("got", store.get("acme", "x"))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="4 calls behind") as refused:
            await store.get("acme", "y")
        assert refused.value.retryable
        assert refused.value.retry_after_s is not None
        claim = asyncio.create_task(noted("claimed", store.claim("acme", "x")))
        await asyncio.sleep(0)
        write = asyncio.create_task(noted("written", store.write([ended("x")])))
        beat = asyncio.create_task(noted("beaten", store.beat()))
        await asyncio.sleep(0)
        go_on.set()
        assert await asyncio.gather(*waiting) == [response("x")] * 4
        assert (await write, await claim) == (["kept"], None)
        await beat
        assert done == ["written", "beaten", "claimed", *["got"] * 4], "the journal waits for no reader"
        assert blocked.result()


# -- trouble -----------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_the_whole_batch_and_reading_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.write([ended()])
        await run(store, "PRAGMA max_page_count = 1")
        with pytest.raises(StoreUnavailable, match="database or disk is full") as refused:
            await store.write([began("resp_r_3"), Ended(saying(SECRET_TEXT, "resp_r_2", times=10_000))])
        assert (refused.value.code, refused.value.status, refused.value.retryable) == ("store_unavailable", 503, True)
        assert await store.get("acme", "resp_r_2") is None
        assert await store.unclaimed() == []
        assert await store.get("acme", "resp_r_1") == response()
        assert SECRET_TEXT not in str(refused.value) + caplog.text
        await run(store, f"PRAGMA max_page_count = {2**31 - 2}")
        assert await store.write([began("resp_r_3"), ended("resp_r_2")]) == ["kept", "kept"]


async def test_a_file_that_somebody_else_has_locked_is_a_sentence_and_free_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY_S", 0.01)
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="database is locked"):
                await store.write([ended()])
        assert await store.write([ended()]) == ["kept"]


async def test_a_damaged_response_is_an_error_not_an_unknown_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.write([ended()])
        await run(store, "UPDATE responses SET payload = x'c1'")
        with pytest.raises(StoreUnavailable, match="cannot read"):
            await store.get("acme", "resp_r_1")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM said WHERE seq = 1",
        "UPDATE said SET payload = x'c1'",
        "UPDATE openings SET payload = x'c1'",
        "DELETE FROM openings WHERE id = 'resp_r_1'",
    ],
)
async def test_an_unfinished_response_with_a_hole_is_given_up_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    async with opened(tmp_path / "s.sqlite") as store:
        await store.write([began(), said(0, 1), said(1, 2), said(2, 3), began("resp_r_2")])
        await run(store, damage)
        assert await store.claim("acme", "resp_r_1") is None
        assert "resp_r_1 is damaged and given up" in caplog.text
        assert SECRET_TEXT not in caplog.text
        assert await store.unclaimed() == [("acme", "resp_r_2")]


# -- what is left of what was deleted ----------------------------------------------------------------


@pytest.mark.parametrize("is_ended", [True, False])
async def test_of_a_deleted_response_no_byte_is_in_any_file(tmp_path: Path, is_ended: bool) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended("resp_other")])
        await store.delete("acme", "resp_other")
        await store.write([began("resp_r_1"), read("resp_r_1")])
        for seq in range(40):
            await store.write([said(seq, seq, text="whispered " * 300)])
        if is_ended:
            await store.write([Ended(saying("whispered ", times=20_000))])
        assert b"whispered" in on_disk(path)
        assert SECRET_TEXT.encode() in on_disk(path)
        assert await store.delete("acme", "resp_r_1")
        assert b"whispered" not in on_disk(path)
        assert SECRET_TEXT.encode() not in on_disk(path)
        assert b"resp_r_1" not in on_disk(path)


async def test_what_was_dropped_or_has_had_its_time_is_in_no_file_after_the_next_beat(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path, max_bytes=2_000) as store:
        await store.write([began(), said(0, 1, text="whispered"), Ended(saying("murmured", "resp_r_2", times=500))])
        await store.write([Dropped("resp_r_1"), Ended(saying("plain", "resp_r_3"))])
        await store.beat()
        assert b"whispered" not in on_disk(path)
        assert b"murmured" not in on_disk(path)
        assert b"plain" in on_disk(path)


async def test_a_deletion_does_not_wait_for_the_beat_for_what_was_dropped_before(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([began(), said(0, 1, text="whispered")])
        # What ran until its client asked for its deletion.
        await store.write([Dropped("resp_r_1")])
        assert not await store.delete("acme", "resp_r_1")
        assert b"whispered" not in on_disk(path)


async def test_while_somebody_reads_in_the_file_a_deletion_is_finished_by_a_later_beat_and_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever waited for the reader would wait for as long as this test may take.
    monkeypatch.setattr(store_module, "BUSY_S", 3600.0)
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([ended()])
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM responses").fetchone() == (1,)
            assert await store.delete("acme", "resp_r_1")
            await store.beat()
            assert await store.write([began("resp_r_2")]) == ["kept"]
            assert await store.get("acme", "resp_r_1") is None
            assert SECRET_TEXT.encode() in on_disk(path)
        await store.write([Dropped("resp_r_2")])
        await store.beat()
        assert SECRET_TEXT.encode() not in on_disk(path)


async def test_what_a_later_response_began_with_goes_within_a_minute_of_its_end(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([Ended(saying("whispered", "resp_r_1"))])
        items = [Item("message", "assistant", "whispered"), Item("message", "user", "and then?")]
        await store.write([Began(msgspec.structs.replace(began("resp_r_2").begun, items=items))])
        assert await store.delete("acme", "resp_r_1")
        assert b"whispered" in on_disk(path), "the one that goes on from it still needs it"
        await store.write([Ended(saying("plain", "resp_r_2"))])
        for _ in range(BEATS_PER_SCRUB):
            await store.beat()
        assert b"whispered" not in on_disk(path)


async def test_of_a_damaged_response_that_was_given_up_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    async with opened(path) as store:
        await store.write([began(), said(0, 1), said(1, 2, text="whispered")])
        await run(store, "DELETE FROM said WHERE seq = 0")
        assert await store.claim("acme", "resp_r_1") is None
        await store.beat()
        assert b"whispered" not in on_disk(path)


async def test_an_opening_is_written_once(tmp_path: Path) -> None:
    path, log = tmp_path / "s.sqlite", tmp_path / "s.sqlite-wal"
    async with opened(path) as store:
        items = [Item("message", "user", "x" * 1_000_000)]
        await store.write([Began(msgspec.structs.replace(began().begun, items=items)), Dropped("resp_r_2")])
        await store.beat()
        assert log.stat().st_size == 0
        await store.write([read()])
        assert isinstance(await store.claim("acme", "resp_r_1"), Unfinished)
        assert log.stat().st_size < 100_000


# -- durability --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("power", 2)])
async def test_a_power_cut_is_waited_for_only_where_it_was_asked_for(
    tmp_path: Path, durability: str, synchronous: int
) -> None:
    path = tmp_path / "s.sqlite"
    store = await SqliteStore.open(path, "a", "1", durability=durability)  # type: ignore[arg-type]
    assert await store._run(lambda: store._connection.execute("PRAGMA synchronous").fetchone(), _Urgency.READ) == (
        synchronous,
    )
    await store.close()
