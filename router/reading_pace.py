"""How far a client has read of what it was told, and whether that is still far enough.

Offsets count the bytes said to one client since its connection or its answer began. Does not know how they travel, or
who learned how far the client is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

# An answer ends by being said whole this often (text, part, item, response), however long it is.
ENDINGS = 4
PING_EVERY_BYTES = 64 * 1024
_OFFSET_BYTES = 8


class ReadingPace:
    """Invariant: 0 <= read_bytes <= said_bytes, and neither ever shrinks.

    most_bytes: what may be unread, besides what nobody can have read yet: what was said in one go, or `ENDINGS` times
    the largest piece, as long as that is unread itself. most_s: how long a client may get no further.
    """

    def __init__(self, *, most_bytes: int, most_s: float) -> None:
        self.said_bytes = 0
        self.read_bytes = 0
        self._most_bytes = most_bytes
        self._most_s = most_s
        self._stands_since_s = 0.0
        # (where it ends, what it allows) of what is unread: the first allows most, each later one less.
        self._allowances: deque[tuple[int, int]] = deque()

    def say(self, sizes: Iterable[int], now_s: float) -> None:
        """Pieces of these `sizes` in bytes were said in one go."""
        pieces = list(sizes)
        if self.read_bytes == self.said_bytes:
            self._stands_since_s = now_s
        self.said_bytes += sum(pieces)
        allowed = max(sum(pieces), ENDINGS * max(pieces, default=0))
        while self._allowances and self._allowances[-1][1] <= allowed:
            self._allowances.pop()
        self._allowances.append((self.said_bytes, allowed))

    def read_to(self, offset: int, now_s: float) -> None:
        """The client has everything before `offset`; what it is known to have already is no news."""
        offset = min(offset, self.said_bytes)
        if offset <= self.read_bytes:
            return
        self.read_bytes = offset
        self._stands_since_s = now_s
        while self._allowances and self._allowances[0][0] <= offset:
            self._allowances.popleft()

    def stands_s(self, now_s: float) -> float:
        """Seconds for which there has been something to read and none of it was; 0 when all is read."""
        return now_s - self._stands_since_s if self.read_bytes < self.said_bytes else 0.0

    def forgive(self, seconds: float) -> None:
        """The client could not be heard for so long, through no fault of its own."""
        self._stands_since_s += seconds

    def is_behind(self, now_s: float) -> bool:
        """Whether the client is too slow to be kept."""
        allowed_bytes = self._most_bytes + (self._allowances[0][1] if self._allowances else 0)
        return self.said_bytes - self.read_bytes > allowed_bytes or self.stands_s(now_s) > self._most_s


class Pings:
    """When to ask a client how far it is, and what its answer proves.

    A ping carries the offset up to which everything was sent before it, and chance: only who read it can answer it.
    salt: a few bytes nobody can guess, others at every call.
    """

    def __init__(self, salt: Callable[[], bytes]) -> None:
        self._salt = salt
        self._pinged_bytes = 0
        self._awaited: deque[tuple[bytes, int]] = deque()

    def after(self, sent_bytes: int) -> bytes | None:
        """The payload of a ping to send now that `sent_bytes` are sent, or None."""
        return self._ping(sent_bytes) if sent_bytes - self._pinged_bytes >= PING_EVERY_BYTES else None

    def when_quiet(self, sent_bytes: int) -> bytes | None:
        """The payload of a ping for what is sent and not asked about yet, or None while an answer is awaited."""
        return self._ping(sent_bytes) if sent_bytes > self._pinged_bytes and not self._awaited else None

    def answered(self, payload: bytes) -> int | None:
        """The offset that a pong proves to be read; None for one that answers no ping, or one answered already."""
        offset = next((offset for awaited, offset in self._awaited if awaited == payload), None)
        if offset is not None:
            while self._awaited and self._awaited[0][1] <= offset:
                self._awaited.popleft()
        return offset

    def _ping(self, sent_bytes: int) -> bytes:
        payload = sent_bytes.to_bytes(_OFFSET_BYTES, "big") + self._salt()
        self._pinged_bytes = sent_bytes
        self._awaited.append((payload, sent_bytes))
        return payload
