"""The bounded way to one client: whoever has something to say never waits, one task writes.

A reader too far behind is cut off by a timer, because the task that writes to a stalled client is
itself blocked. Does not know what it carries.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

# An answer ends by being said whole this often (text, part, item, response), however long it is.
ENDINGS = 4


class Outbox:
    """Invariant: what was put comes out in order, until `finish` or `abort`.

    most_bytes: queued here and in the transport's buffer together, besides `ENDINGS` times the largest that is
    among them: nobody can have read what was said just now. most_s: age of the oldest byte not written.
    """

    def __init__(
        self,
        transport: asyncio.Transport | None,
        now_s: Callable[[], float],
        *,
        most_bytes: int,
        most_s: float,
    ) -> None:
        self._transport = transport
        self._now_s = now_s
        self._most_bytes = most_bytes
        self._most_s = most_s
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._largest_bytes = 0
        self._oldest_s: float | None = None
        self._finished = False
        self._wake = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Queue `data`; after `finish` or `abort` it is dropped, for nobody reads any more."""
        if self._finished:
            return
        if self._oldest_s is None:
            self._oldest_s = self._now_s()
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._largest_bytes = max(self._largest_bytes, len(data))
        self._wake.set()

    def finish(self) -> None:
        """Nothing follows; `drain` returns when all is written."""
        self._finished = True
        self._wake.set()

    def behind(self, now_s: float) -> bool:
        """Whether the reader is too slow to be kept."""
        if self._transport is None:
            return False
        unsent_bytes = self._queued_bytes + self._transport.get_write_buffer_size()
        allowed_bytes = self._most_bytes + ENDINGS * self._largest_bytes
        return unsent_bytes > allowed_bytes or (self._oldest_s is not None and now_s - self._oldest_s > self._most_s)

    def abort(self) -> None:
        """Cut the connection without waiting for anything."""
        self._queue.clear()
        self._queued_bytes, self._largest_bytes, self._oldest_s = 0, 0, None
        self.finish()
        if self._transport is not None:
            self._transport.abort()

    async def drain(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Hand out what is queued until finished. Cancelling it loses the piece in hand.

        write: passes a piece to the transport, which counts it from then on, and waits until more is taken.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                piece = self._queue.popleft()
                self._queued_bytes -= len(piece)
                await write(piece)
                self._oldest_s = self._now_s() if self._queue else None
            self._largest_bytes = 0
            if self._finished:
                return
