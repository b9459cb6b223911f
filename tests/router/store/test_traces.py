"""Of rows that SQLite has moved about nothing is left once they are deleted."""

from __future__ import annotations

import contextlib
import errno
import random
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import StoreUnavailable
from core.frames import Text
from router.journal import Dropped, Ended, Said
from router.store import sqlite as store_module
from router.store.sqlite import SqliteStore
from router.store.traces import Traces
from tests.router.store.entries import SCHEMA_1, began, on_disk, saying


def word(response_id: str) -> str:
    """Something that no other response says."""
    return f"whispered-{response_id[-12:]}-"


def check(path: Path) -> None:
    """What is there is sound to SQLite."""
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def ids(chance: random.Random) -> Iterator[str]:
    while True:
        yield f"resp_r_{chance.getrandbits(96):024x}"


@pytest.mark.parametrize("seed", range(3))
async def test_rows_that_grew_side_by_side_and_were_moved_leave_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "s.sqlite"
    store = await SqliteStore.open(path, "a", "1")
    names = ids(chance)
    count: dict[str, int] = {}
    gone: list[str] = []
    finished: list[str] = []
    for _ in range(80):
        while len(count) < 15:
            name = next(names)
            count[name] = 0
            await store.write([began(name)])
        batch = []
        for name in chance.sample(sorted(count), 10):
            text = word(name) + "x" * chance.randint(1, chance.choice([200, 200, 9000]))
            batch.append(Said(name, count[name], [5], [[Text(text)]]))
            count[name] += 1
        assert set(await store.write(batch)) == {"kept"}
        name = chance.choice(sorted(count))
        match chance.choice(["end", "end", "drop", "delete", "go on"]):
            case "end":
                text = word(name) + "y" * chance.randint(1, 3000)
                assert await store.write([Ended(saying(text, name))]) == ["kept"]
                finished.append(name)
                del count[name]
            case "drop":
                assert await store.write([Dropped(name)]) == ["kept"]
                await store.beat()
                gone.append(name)
                del count[name]
            case "delete":
                assert await store.delete("acme", name)
                gone.append(name)
                del count[name]
            case _:
                pass
        if finished and chance.random() < 0.4:
            gone.append(finished.pop(chance.randrange(len(finished))))
            assert await store.delete("acme", gone[-1])
        there = on_disk(path)
        assert [name for name in gone if word(name).encode() in there] == []
    assert len(gone) > 30
    kept = [await store.get("acme", name) for name in finished]
    assert [one is not None and one.record.id for one in kept] == finished
    assert {response_id for _, response_id in await store.unclaimed()} == set(count)
    await store.close()
    check(path)


async def test_finished_responses_leave_nothing_in_the_pages_of_those_that_stay(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    chance = random.Random(1)
    store = await SqliteStore.open(path, "a", "1")
    names = ids(chance)
    written = [next(names) for _ in range(200)]
    await store.write([Ended(saying(word(name) + "x" * chance.randint(1, 2500), name)) for name in written])
    gone = chance.sample(written, 160)
    for name in gone:
        assert await store.delete("acme", name)
        assert word(name).encode() not in on_disk(path)
    there = on_disk(path)
    assert [name for name in gone if word(name).encode() in there] == []
    for name in set(written) - set(gone):
        assert await store.get("acme", name) is not None
    await store.close()
    check(path)


def plant(path: Path) -> None:
    """What SQLite leaves at times: in the room of a page with rows there is a copy of one that is no more."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 4096):
        count, first = struct.unpack_from(">HH", data, at + 3)
        if data[at] == 13 and first - 8 - 2 * count > 100:
            data[at + first - 60 : at + first - 50] = b"whispered-"
            path.write_bytes(data)
            return
    raise AssertionError("there is no such page")


@pytest.mark.parametrize("moved", [False, True], ids=["its log is there", "somebody moved its log into the file"])
async def test_what_a_killed_router_left_is_gone_after_the_next_start(tmp_path: Path, moved: bool) -> None:
    path = tmp_path / "s.sqlite"
    store = await SqliteStore.open(path, "a", "1")
    await store.write([Ended(saying("spoken", f"resp_r_{number}")) for number in range(20)])
    await store.write([began("resp_r_x"), Said("resp_r_x", 0, [1], [[Text("whispered-")]])])
    await store.write([Dropped("resp_r_x")])
    killed = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    await store.close()
    for file in tmp_path.iterdir():
        file.unlink()
    for name, data in killed.items():
        (tmp_path / name).write_bytes(data)
    if moved:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        plant(path)
    assert b"whispered-" in on_disk(path)
    store = await SqliteStore.open(path, "a", "2")
    assert b"whispered-" not in on_disk(path)
    assert [await store.get("acme", f"resp_r_{number}") is None for number in range(20)] == [False] * 20
    await store.close()
    check(path)


async def test_what_could_not_be_wiped_is_told_and_wiped_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.sqlite"
    store = await SqliteStore.open(path, "a", "1")
    await store.write([Ended(saying("whispered-", "resp_r_1")), Ended(saying("spoken", "resp_r_2"))])
    await store.beat()

    def fail(self: Traces) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Traces, "wipe", fail)
        for call in (store.delete("acme", "resp_r_1"), store.beat()):
            with pytest.raises(StoreUnavailable, match="No space left"):
                await call
        assert await store.get("acme", "resp_r_1") is None
        assert await store.write([began()]) == ["kept"], "what is kept needs no tidying up"
        await store.close()
    assert "cannot be tidied up" in caplog.text
    plant(path)
    store = await SqliteStore.open(path, "a", "1")
    assert b"whispered-" not in on_disk(path)
    assert await store.get("acme", "resp_r_2") is not None
    await store.close()


async def test_a_file_of_schema_1_is_looked_through(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(SCHEMA_1)
        for number in range(10):
            old.execute("INSERT INTO responses VALUES ('acme', ?, 1, NULL, zeroblob(300))", (f"resp_{number}",))
        old.commit()
    plant(path)
    store = await SqliteStore.open(path, "a", "1")
    assert b"whispered-" not in on_disk(path)
    await store.close()
    check(path)


async def test_a_file_that_was_left_clean_is_not_looked_through_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.sqlite"
    looked: list[bool] = []
    monkeypatch.setattr(Traces, "note_all", lambda self: looked.append(True))
    for expected in (1, 1):
        store = await SqliteStore.open(path, "a", "1")
        await store.write([began()])
        await store.delete("acme", "resp_r_1")
        await store.close()
        assert len(looked) == expected, "at first nobody knows what was done to the file"


async def test_the_log_stays_short_while_responses_are_said_and_while_somebody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOG_BYTES", 100_000)
    path = tmp_path / "s.sqlite"
    log = tmp_path / "s.sqlite-wal"
    store = await SqliteStore.open(path, "a", "1")
    await store.write([began()])

    async def say(first: int) -> int:
        for seq in range(first, first + 20):
            assert await store.write([Said("resp_r_1", seq, [1], [[Text("x" * 20_000)]])]) == ["kept"]
        return log.stat().st_size

    assert await say(0) < 200_000
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN")
        assert other.execute("SELECT count(*) FROM said").fetchone() == (20,)
        assert await say(20) > 400_000, "what somebody still reads stays"
    assert await say(40) < 200_000
    await store.close()
    check(path)


async def test_a_file_that_moves_its_own_pages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.executescript("PRAGMA auto_vacuum = FULL; PRAGMA user_version = 1; VACUUM;")
        assert other.execute("PRAGMA auto_vacuum").fetchone() == (1,)
    with pytest.raises(StoreUnavailable, match="VACUUM"):
        await SqliteStore.open(path, "a", "1")
