from __future__ import annotations

import asyncio
from typing import cast

from router.http.outbox import Outbox


class FakeTransport:
    def __init__(self) -> None:
        self.buffered_bytes = 0
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.buffered_bytes

    def abort(self) -> None:
        self.aborted = True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def outbox(transport: FakeTransport, clock: Clock) -> Outbox:
    return Outbox(cast(asyncio.Transport, transport), clock, most_bytes=100, most_s=20.0)


async def test_everything_put_comes_out_in_order_even_after_finish() -> None:
    box, seen = outbox(FakeTransport(), Clock()), list[bytes]()

    async def write(piece: bytes) -> None:
        if not seen:
            box.put(b"c")
            box.finish()
        seen.append(piece)

    box.put(b"a")
    box.put(b"b")
    await box.drain(write)
    assert seen == [b"a", b"b", b"c"]


async def test_a_reader_is_behind_by_bytes_queued_and_buffered_together() -> None:
    transport, clock = FakeTransport(), Clock()
    box = outbox(transport, clock)
    for _ in range(6):
        box.put(b"x" * 10)
    transport.buffered_bytes = 80
    assert not box.behind(0.0)
    transport.buffered_bytes = 81
    assert box.behind(0.0)


async def test_an_answer_longer_than_the_allowance_may_end_and_more_is_too_much() -> None:
    box = outbox(FakeTransport(), Clock())
    for _ in range(4):
        box.put(b"x" * 150)
    box.put(b"x" * 100)
    assert not box.behind(0.0)
    box.put(b"x")
    assert box.behind(0.0)


async def test_what_is_being_written_is_not_counted_twice() -> None:
    transport, release, stuck = FakeTransport(), asyncio.Event(), asyncio.Event()
    box = outbox(transport, Clock())

    async def write(piece: bytes) -> None:
        transport.buffered_bytes = len(piece)
        stuck.set()
        await release.wait()
        transport.buffered_bytes = 0

    for _ in range(4):
        box.put(b"x" * 150)
    draining = asyncio.create_task(box.drain(write))
    await stuck.wait()
    box.put(b"x" * 100)
    assert not box.behind(0.0)
    box.finish()
    release.set()
    await draining


async def test_a_long_answer_that_was_read_allows_no_more_to_what_follows() -> None:
    box, read = outbox(FakeTransport(), Clock()), asyncio.Event()

    async def write(piece: bytes) -> None:
        read.set()

    box.put(b"x" * 150)
    draining = asyncio.create_task(box.drain(write))
    await read.wait()
    for _ in range(105):
        box.put(b"x")
    assert box.behind(0.0)
    box.finish()
    await draining


async def test_a_reader_is_behind_by_age_while_a_write_is_stuck_and_not_after() -> None:
    clock = Clock()
    box, release, stuck = outbox(FakeTransport(), clock), asyncio.Event(), asyncio.Event()

    async def write(piece: bytes) -> None:
        stuck.set()
        await release.wait()

    box.put(b"a")
    draining = asyncio.create_task(box.drain(write))
    await stuck.wait()
    assert not box.behind(20.0)
    assert box.behind(20.1)
    box.finish()
    release.set()
    await draining
    assert not box.behind(1000.0)


async def test_abort_cuts_the_connection_and_takes_nothing_more() -> None:
    transport = FakeTransport()
    box = outbox(transport, Clock())
    box.put(b"x" * 200)
    box.abort()
    box.put(b"y" * 200)
    assert transport.aborted
    assert not box.behind(1000.0)


async def test_a_connection_that_is_gone_is_never_behind() -> None:
    box = Outbox(None, Clock(), most_bytes=1, most_s=1.0)
    box.put(b"abc")
    assert not box.behind(100.0)
    box.abort()
