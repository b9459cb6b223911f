"""Clients that hold a connection and do not use it: no request comes, or nothing of an answer is taken.

A decision over a clock and what transports and kernel hold. What a stream still has to say is watched by its outbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import NamedTuple, TypeAlias

from aiohttp import web

from router.http import kernel

Connection: TypeAlias = web.RequestHandler

# From the connection to the end of the first request's head.
HEAD_S = 10.0
LOOK_EVERY_S = 1.0


class _Seen(NamedTuple):
    moved_at_s: float
    unsent_bytes: int


class Stalls:
    """Invariant: knows the connections of the latest look and no others."""

    def __init__(self, unread_s: float) -> None:
        """unread_s: how long a client may take nothing of what is ready for it."""
        self._unread_s = unread_s
        self._looked_at_s = float("-inf")
        self._asked: set[Connection] = set()
        self._seen: dict[Connection, _Seen] = {}

    def asked(self, connection: Connection) -> None:
        """A whole request head came."""
        self._asked.add(connection)

    def look(
        self, connections: Iterable[Connection], now_s: float, watched: Collection[asyncio.BaseTransport] = ()
    ) -> list[Connection]:
        """The connections that are to be cut off; one of `watched` has an outbox, which knows better."""
        if now_s - self._looked_at_s < LOOK_EVERY_S:
            return []
        self._looked_at_s = now_s
        self._seen = {connection: self._look_at(connection, now_s, watched) for connection in connections}
        self._asked &= self._seen.keys()
        return [
            connection
            for connection, seen in self._seen.items()
            if now_s - seen.moved_at_s > self._patience_s(connection)
        ]

    def forgive(self, seconds: float) -> None:
        """This router stood still for so long, and took nothing from anybody."""
        self._seen = {
            connection: seen._replace(moved_at_s=seen.moved_at_s + seconds) for connection, seen in self._seen.items()
        }

    def _look_at(self, connection: Connection, now_s: float, watched: Collection[asyncio.BaseTransport]) -> _Seen:
        transport, unsent_bytes = connection.transport, 0
        if transport is not None:
            unsent_bytes = transport.get_write_buffer_size() + kernel.unacknowledged_bytes(transport)
            if transport in watched:
                return _Seen(now_s, unsent_bytes)
        before = self._seen.get(connection)
        if before is None or unsent_bytes < before.unsent_bytes or (unsent_bytes == 0 and connection in self._asked):
            return _Seen(now_s, unsent_bytes)
        return _Seen(before.moved_at_s, unsent_bytes)

    def _patience_s(self, connection: Connection) -> float:
        return self._unread_s if connection in self._asked else HEAD_S
