"""What every handler needs, put together once by `router/server`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from router.auth import Keyring, Principal, presented_key, subprotocols
from router.config import Config, Role
from router.dispatch import Dispatcher
from router.finder import Finder
from router.fleet import Fleet
from router.http.outbox import Outbox, PingedOutbox
from router.http.stalls import Connection, Stalls
from router.keeper import Keeper
from router.metrics import Metrics
from router.peers import Peers
from router.session import Instant
from router.sessions import Sessions
from router.shelf import Shelf


class Closable(Protocol):
    """An open WebSocket that can be told to go."""

    async def close(self, code: int) -> None: ...


@dataclass(eq=False)
class Context:
    """peers: every open WebSocket, for shutdown. outboxes: every stream being written, for the slow-reader timer.
    clients: gives the connections of the port, asked or not.
    """

    config: Config
    keyring: Keyring
    fleet: Fleet
    sessions: Sessions
    dispatcher: Dispatcher
    store: Shelf
    keeper: Keeper
    routers: Peers
    finder: Finder
    link_secret: str = field(repr=False)
    metrics: Metrics
    now: Callable[[], Instant]
    peers: set[Closable] = field(default_factory=set)
    outboxes: set[Outbox] = field(default_factory=set)
    clients: Callable[[], Iterable[Connection]] = tuple
    connections: int = 0

    def __post_init__(self) -> None:
        self.stalls = Stalls(self.config.limits.slow_reader_s)

    def forgive(self, seconds: float) -> None:
        """This router stood still for so long (stopped, swapped, a laptop's lid): nobody else is to blame for it."""
        self.fleet.forgive(seconds)
        self.stalls.forgive(seconds)
        for outbox in self.outboxes:
            outbox.forgive(seconds)

    def on_tick(self) -> None:
        """Every 250 ms."""
        now_s = self.now().mono_s
        self.sessions.on_tick()
        for outbox in list(self.outboxes):
            outbox.look(now_s)
        watched = {outbox.transport for outbox in self.outboxes if outbox.transport is not None}
        for connection in self.stalls.look(self.clients(), now_s, watched):
            if connection.transport is not None and not connection.transport.is_closing():
                self.metrics.stalled.inc()
                connection.transport.abort()

    def new_outbox(self, request: web.Request) -> Outbox:
        """A bounded way to this client, watched until `outboxes.discard`."""
        limits = self.config.limits
        outbox = Outbox(
            request.transport,
            self._mono_s,
            most_bytes=limits.slow_reader_bytes,
            most_s=limits.slow_reader_s,
            on_cut=self.metrics.slow_readers.inc,
        )
        self.outboxes.add(outbox)
        return outbox

    def new_pinged_outbox(
        self, request: web.Request, ping: Callable[[bytes], None], farewell: Callable[[], None]
    ) -> PingedOutbox:
        """The same, to a client that answers pings."""
        limits = self.config.limits
        outbox = PingedOutbox(
            request.transport,
            self._mono_s,
            most_bytes=limits.slow_reader_bytes,
            most_s=limits.slow_reader_s,
            on_cut=self.metrics.slow_readers.inc,
            salt=lambda: secrets.token_bytes(8),
            ping=ping,
            farewell=farewell,
        )
        self.outboxes.add(outbox)
        return outbox

    def _mono_s(self) -> float:
        return self.now().mono_s


CONTEXT: web.AppKey[Context] = web.AppKey("context", Context)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def context_of(request: web.Request) -> Context:
    return request.app[CONTEXT]


def principal(request: web.Request, role: Role | None) -> Principal:
    """Who asks; role None = any key will do. Raises NotAuthorised or Forbidden."""
    offered = subprotocols(request.headers.get("Sec-WebSocket-Protocol"))
    who = context_of(request).keyring.authenticate(presented_key(request.headers.get("Authorization"), offered))
    if role is not None:
        who.require(role)
    return who


def request_id(request: web.Request) -> str:
    """The client's own `x-request-id` if it is a plain word, else a new one; the same for the whole request."""
    if REQUEST_ID not in request:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if _PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
    return request[REQUEST_ID]
