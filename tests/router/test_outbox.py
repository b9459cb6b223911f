from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count
from typing import Any, cast

import pytest

from router.http.outbox import PART_BYTES, Outbox, PingedOutbox
from router.reading_pace import PING_EVERY_BYTES


class FakeTransport:
    """kernel_bytes: what the system would say of the socket beneath."""

    def __init__(self) -> None:
        self.buffered_bytes = 0
        self.kernel_bytes = 0
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.buffered_bytes

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Cuts:
    count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.kernel.unacknowledged_bytes", lambda transport: transport.kernel_bytes)
    monkeypatch.setattr("router.http.kernel.forget_within", lambda transport, most_s: None)


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cuts() -> Cuts:
    return Cuts()


@pytest.fixture
def box(transport: FakeTransport, clock: Clock, cuts: Cuts) -> Outbox:
    return Outbox(cast(asyncio.Transport, transport), clock, most_bytes=100, most_s=20.0, on_cut=cuts)


class Pinged:
    """A WebSocket's outbox; what it writes by itself is in `pings` and `farewells`."""

    def __init__(self, transport: FakeTransport, clock: Clock, cuts: Cuts) -> None:
        self.pings: list[bytes] = []
        self.farewells = 0
        salts = count()
        self.box = PingedOutbox(
            cast(asyncio.Transport, transport),
            clock,
            most_bytes=3 * PING_EVERY_BYTES,
            most_s=20.0,
            on_cut=cuts,
            salt=lambda: next(salts).to_bytes(8, "big"),
            ping=self.pings.append,
            farewell=self._say_farewell,
        )

    def _say_farewell(self) -> None:
        self.farewells += 1


@pytest.fixture
def pinged(transport: FakeTransport, clock: Clock, cuts: Cuts) -> Pinged:
    return Pinged(transport, clock, cuts)


async def taken(piece: bytes) -> None:
    """A write that the kernel takes at once."""


async def written(box: Outbox, *pieces: bytes) -> asyncio.Task[Any]:
    """Put the pieces and let the one that drains take them."""
    draining = asyncio.create_task(box.drain(taken))
    for piece in pieces:
        box.put(piece)
        await asyncio.sleep(0)
    return draining


async def test_everything_put_comes_out_in_order_even_after_finish(box: Outbox) -> None:
    seen = list[bytes]()

    async def write(piece: bytes) -> None:
        if not seen:
            box.put(b"c")
            box.finish()
        seen.append(piece)

    box.put(b"a", b"b")
    assert await box.drain(write)
    assert seen == [b"a", b"b", b"c"]


async def test_a_long_piece_is_written_in_parts_that_a_transport_counts(box: Outbox) -> None:
    seen = list[bytes]()

    async def write(piece: bytes) -> None:
        seen.append(piece)

    long = bytes(range(256)) * 1024
    box.put(long)
    box.finish()
    await box.drain(write)
    assert b"".join(seen) == long
    assert max(map(len, seen)) == PART_BYTES


@pytest.mark.parametrize(
    ("buffered_bytes", "kernel_bytes", "cut"), [(60, 20, True), (60, 19, False), (59, 20, False), (0, 0, False)]
)
async def test_a_reader_is_behind_by_bytes_queued_buffered_and_unconfirmed_together(
    box: Outbox, transport: FakeTransport, cuts: Cuts, buffered_bytes: int, kernel_bytes: int, cut: bool
) -> None:
    (await written(box, *[b"x" * 10] * 8)).cancel()
    transport.buffered_bytes, transport.kernel_bytes = buffered_bytes, kernel_bytes
    for _ in range(6):
        box.put(b"x" * 10)
    assert not transport.aborted
    box.put(b"x")
    assert (transport.aborted, cuts.count) == (cut, int(cut))


async def test_what_comes_between_two_looks_is_bounded_without_them(
    box: Outbox, transport: FakeTransport, cuts: Cuts
) -> None:
    for _ in range(10_000):
        box.put(b"x" * 10)
    assert transport.aborted
    assert cuts.count == 1
    assert not await box.drain(taken)


async def test_a_reader_that_takes_all_is_not_cut_however_much_is_put(box: Outbox, transport: FakeTransport) -> None:
    (await written(box, *[b"x" * 10] * 1000)).cancel()
    assert not transport.aborted


async def test_a_reader_is_behind_by_age_while_nothing_of_a_stuck_write_is_taken_and_not_after(
    box: Outbox, transport: FakeTransport, clock: Clock
) -> None:
    release, stuck = asyncio.Event(), asyncio.Event()

    async def write(piece: bytes) -> None:
        transport.buffered_bytes = 10
        stuck.set()
        await release.wait()
        transport.buffered_bytes = 0

    box.put(b"x" * 10)
    draining = asyncio.create_task(box.drain(write))
    await stuck.wait()
    box.look(20.0)
    transport.buffered_bytes = 9
    clock.now_s = 20.0
    box.look(20.0)
    box.look(40.0)
    assert not transport.aborted
    box.finish()
    release.set()
    assert await draining
    box.look(1000.0)
    assert not transport.aborted


async def test_a_reader_that_takes_nothing_is_cut_by_age_and_the_rest_is_dropped(
    box: Outbox, transport: FakeTransport, cuts: Cuts
) -> None:
    box.put(b"x" * 10)
    box.look(20.1)
    box.put(b"y")
    box.look(40.2)
    assert (transport.aborted, cuts.count) == (True, 1)
    assert not await box.drain(taken)


@pytest.fixture
def nobody(clock: Clock, cuts: Cuts) -> Iterator[Outbox]:
    yield Outbox(None, clock, most_bytes=1, most_s=1.0, on_cut=cuts)
    assert cuts.count == 0


async def test_a_connection_that_is_gone_takes_nothing_and_is_never_behind(nobody: Outbox) -> None:
    nobody.put(b"abc")
    nobody.look(100.0)
    seen = list[bytes]()

    async def write(piece: bytes) -> None:
        seen.append(piece)

    assert await nobody.drain(write)
    assert seen == []


async def test_a_pinged_reader_has_read_what_it_answered_and_nothing_that_a_kernel_took(
    pinged: Pinged, transport: FakeTransport, cuts: Cuts
) -> None:
    piece = b"x" * (PING_EVERY_BYTES // 16)
    draining = await written(pinged.box, *[piece] * 52)
    assert [int.from_bytes(ping[:8], "big") for ping in pinged.pings] == [n * PING_EVERY_BYTES for n in (1, 2, 3)]
    assert not transport.aborted
    pinged.box.on_pong(pinged.pings[0])
    for _ in range(16):
        pinged.box.put(piece)
    assert not transport.aborted
    pinged.box.on_pong(b"anything")
    pinged.box.on_pong(pinged.pings[0])
    pinged.box.put(b"x")
    assert (transport.aborted, cuts.count, pinged.farewells) == (True, 1, 1)
    assert not await draining


async def test_a_pinged_reader_that_was_told_little_is_asked_and_cut_by_age(
    pinged: Pinged, transport: FakeTransport, clock: Clock
) -> None:
    (await written(pinged.box, b"x" * 10)).cancel()
    pinged.box.look(4.9)
    assert pinged.pings == []
    for now_s in (5.0, 10.0, 20.0):
        pinged.box.look(now_s)
    assert [int.from_bytes(ping[:8], "big") for ping in pinged.pings] == [10]
    assert not transport.aborted
    pinged.box.look(20.1)
    assert transport.aborted


async def test_a_pinged_reader_that_was_told_little_and_answers_is_kept_and_asked_no_more(
    pinged: Pinged, transport: FakeTransport
) -> None:
    (await written(pinged.box, b"x" * 10)).cancel()
    pinged.box.look(5.0)
    pinged.box.on_pong(pinged.pings[0])
    for now_s in range(10, 1000, 10):
        pinged.box.look(now_s)
    assert len(pinged.pings) == 1
    assert not transport.aborted


async def test_no_farewell_is_said_into_a_transport_that_is_full(pinged: Pinged, transport: FakeTransport) -> None:
    (await written(pinged.box, b"x" * 10)).cancel()
    transport.buffered_bytes = 1
    pinged.box.look(20.1)
    assert transport.aborted
    assert pinged.farewells == 0
