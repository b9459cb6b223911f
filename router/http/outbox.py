"""The bounded way to one client: whoever has something to say never waits, one task writes.

A reader too far behind is cut off by a timer or by what is put, because the task that writes to a stalled client is
itself blocked. Does not know what it carries.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

from router.http import kernel
from router.reading_pace import Pings, ReadingPace

PART_BYTES = 64 * 1024


class Outbox:
    """Invariant: what was put comes out in order, until `finish` or until it is cut.

    How far the client is, the kernel tells: it has read what neither waits here, nor in the transport, nor there.
    most_bytes, most_s: see `ReadingPace`. on_cut: told once, at the cut.
    """

    def __init__(
        self,
        transport: asyncio.Transport | None,
        now_s: Callable[[], float],
        *,
        most_bytes: int,
        most_s: float,
        on_cut: Callable[[], None],
    ) -> None:
        self.transport = transport
        self._now_s = now_s
        self._most_s = most_s
        self._on_cut = on_cut
        self._pace = ReadingPace(most_bytes=most_bytes, most_s=most_s)
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._cut = False
        self._wake = asyncio.Event()
        if transport is None:
            self.finish()

    @property
    def unread_bytes(self) -> int:
        """What was said and is not known to be read."""
        return self._pace.said_bytes - self._pace.read_bytes

    @property
    def open(self) -> bool:
        """Whether what is put comes out."""
        return not self._closed

    def put(self, *pieces: bytes) -> None:
        """Queue what is said in one go; after `finish` or a cut it is dropped, for nobody reads any more.

        Cuts by itself, so that what waits here is bounded however much comes between two looks.
        """
        if self._closed or not pieces:
            return
        now_s = self._now_s()
        sizes = [len(piece) for piece in pieces]
        for piece in pieces:
            self._queue.extend(self._parts(piece))
        self._queued_bytes += sum(sizes)
        self._pace.say(sizes, now_s)
        self._wake.set()
        if self._pace.is_behind(now_s):
            self.look(now_s)

    def forgive(self, seconds: float) -> None:
        """This router stood still for so long, and heard nobody."""
        self._pace.forgive(seconds)

    def finish(self) -> None:
        """Nothing follows; `drain` returns when all is written."""
        self._closed = True
        self._wake.set()

    def look(self, now_s: float) -> None:
        """Learn how far the client is, and cut the connection of one too slow to be kept; at every tick."""
        if self.transport is None or self._cut:
            return
        self._learn(self.transport, now_s)
        if self._pace.is_behind(now_s):
            self._cut_off(self.transport)

    async def drain(self, write: Callable[[bytes], Awaitable[None]]) -> bool:
        """Hand out what is queued until finished, and say whether that was all: False after a cut.

        Cancelling it loses the piece in hand. write: passes a piece to the transport, which counts it from then on,
        and waits until more is taken.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                piece = self._queue.popleft()
                self._queued_bytes -= len(piece)
                await write(piece)
                self._on_written(len(piece))
            if self._closed:
                return not self._cut

    def _parts(self, piece: bytes) -> Iterator[bytes]:
        """What is written at once: TLS does not count what it passed on, and passes on whatever it is given."""
        for start in range(0, len(piece), PART_BYTES):
            yield piece[start : start + PART_BYTES]

    def _learn(self, transport: asyncio.Transport, now_s: float) -> None:
        unread_bytes = self._queued_bytes + transport.get_write_buffer_size() + kernel.unacknowledged_bytes(transport)
        self._pace.read_to(self._pace.said_bytes - unread_bytes, now_s)

    def _on_written(self, written_bytes: int) -> None:
        """The transport has a piece more."""

    def _say_farewell(self) -> None:
        """The last thing to say to a client that is cut off while it could still be told; must not wait."""

    def _cut_off(self, transport: asyncio.Transport) -> None:
        self._cut = True
        self._queue.clear()
        self._queued_bytes = 0
        self.finish()
        if not transport.is_closing():
            if transport.get_write_buffer_size() == 0:
                self._say_farewell()
            kernel.forget_within(transport, self._most_s)
            transport.abort()
        self._on_cut()


class PingedOutbox(Outbox):
    """One whose client says itself how far it is, by answering pings: the kernels between take megabytes unread.

    ping: writes a ping with this payload behind what is written. farewell: writes why the connection ends.
    Neither waits.
    """

    def __init__(
        self,
        transport: asyncio.Transport | None,
        now_s: Callable[[], float],
        *,
        most_bytes: int,
        most_s: float,
        on_cut: Callable[[], None],
        salt: Callable[[], bytes],
        ping: Callable[[bytes], None],
        farewell: Callable[[], None],
    ) -> None:
        super().__init__(transport, now_s, most_bytes=most_bytes, most_s=most_s, on_cut=on_cut)
        self._quiet_s = most_s / 4
        self._pings = Pings(salt)
        self._ping = ping
        self._farewell = farewell
        self._sent_bytes = 0

    def on_pong(self, payload: bytes) -> None:
        """The client answered a ping, or says so."""
        offset = self._pings.answered(payload)
        if offset is not None:
            self._pace.read_to(offset, self._now_s())

    def _parts(self, piece: bytes) -> Iterator[bytes]:
        """A piece is a message, and that is written whole."""
        yield piece

    def _learn(self, transport: asyncio.Transport, now_s: float) -> None:
        """Pongs have told; what is short of a ping and long unconfirmed is asked about."""
        if self._pace.stands_s(now_s) < self._quiet_s or transport.is_closing():
            return
        payload = self._pings.when_quiet(self._sent_bytes)
        if payload is not None:
            self._ping(payload)

    def _on_written(self, written_bytes: int) -> None:
        self._sent_bytes += written_bytes
        payload = self._pings.after(self._sent_bytes)
        if payload is not None:
            self._ping(payload)

    def _say_farewell(self) -> None:
        self._farewell()
