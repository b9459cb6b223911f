"""The port that routers and operators reach: frames on /link, HTTP on /livez, /readyz and /metrics.

Carries frames and tells links apart; what they mean is the node's. One WebSocket per router; any number of routers.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import socket
import ssl
from collections.abc import Iterable
from typing import Protocol

from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from core.errors import FrameError
from core.frames import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Cancel,
    Generate,
    Hello,
    Ping,
    Status,
    ToNode,
    ToRouter,
    decode_to_node,
    encode,
)
from edge_node import admin
from edge_node.switchboard import LinkId

log = logging.getLogger("edge_node.link")

LINK_PATH = "/link"
HELLO_S = 5.0
MAX_LINKS = 256
# A router that leaves this much unread is cut off: it would be told of the past only.
MAX_BACKLOG_BYTES = 8 * 1024 * 1024
# A router that vanished without a word is noticed after PING_S + PONG_S.
PING_S = 5.0
PONG_S = 10.0
CLOSE_S = 1.0
_REASON_BYTES = 123


class NodeSide(Protocol):
    """What the port asks of the node and tells it."""

    def hello(self) -> Hello: ...

    def first_status(self) -> Status: ...

    def echo(self, nonce: int) -> Status: ...

    def facts(self) -> admin.Facts: ...

    def on_generate(self, link: LinkId, request: Generate) -> None: ...

    def on_cancel(self, link: LinkId, cancel: Cancel) -> None: ...

    def on_link_lost(self, link: LinkId) -> None: ...


class _Refused(Exception):
    """The router broke the rules: how to close."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason.encode()[:_REASON_BYTES].decode(errors="ignore")


class LinkServer:
    """Serves one port. Invariant: `_links` holds exactly the links that said Hello and were not lost yet."""

    def __init__(self, node: NodeSide, secret: str, *, metrics_open: bool, certificates: bool = False) -> None:
        """secret: what routers send as bearer, empty = none asked for. metrics_open: /metrics without it.
        certificates: routers must have shown one, which TLS has checked.
        """
        self._node = node
        self._secret = secret
        self._metrics_open = metrics_open
        self._certificates = certificates
        self._links: dict[LinkId, ServerConnection] = {}
        self._ids = itertools.count(1)
        self._server: Server | None = None

    def __len__(self) -> int:
        return len(self._links)

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._server = await serve(
            self._serve_router,
            sock=listener,
            ssl=tls,
            process_request=self._process_request,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            max_queue=4,
            ping_interval=PING_S,
            ping_timeout=PONG_S,
            close_timeout=CLOSE_S,
            server_header=None,
        )

    async def close(self) -> None:
        """Stop listening and say goodbye to every router (1012); one that does not answer is left after CLOSE_S."""
        if self._server is not None:
            self._server.close(code=CloseCode.SERVICE_RESTART, reason="the node is shutting down")
            await self._server.wait_closed()

    # -- sending ---------------------------------------------------------------------------------

    def send(self, link: LinkId, frames: Iterable[ToRouter]) -> None:
        """Write without waiting; the socket's buffer is the queue, and it is bounded. A lost link is no error."""
        connection = self._links.get(link)
        if connection is not None:
            for frame in frames:
                self._write([connection], encode(frame))

    def send_all(self, frame: ToRouter) -> None:
        self._write(list(self._links.values()), encode(frame))

    def _write(self, connections: list[ServerConnection], data: bytes) -> None:
        broadcast(connections, data)
        for connection in connections:
            backlog_bytes = connection.transport.get_write_buffer_size()
            if backlog_bytes > MAX_BACKLOG_BYTES and not connection.transport.is_closing():
                log.warning("link_too_slow peer=%s backlog_bytes=%d", _peer(connection), backlog_bytes)
                connection.transport.abort()

    # -- one router ------------------------------------------------------------------------------

    async def _serve_router(self, connection: ServerConnection) -> None:
        link = LinkId(next(self._ids))
        peer, refused = _peer(connection), None
        try:
            hello = await self._greet(connection)
            self._links[link] = connection
            log.info("link_up link=%d router=%s instance=%s peer=%s", link, hello.name, hello.instance, peer)
            self.send(link, [self._node.first_status()])
            while True:
                self._on_frame(link, await _receive(connection))
        except _Refused as error:
            refused = error
            log.warning("link_refused link=%d peer=%s reason=%r", link, peer, error.reason)
        except ConnectionClosed:
            pass
        finally:
            if self._links.pop(link, None) is not None:
                log.info("link_lost link=%d peer=%s", link, peer)
                self._node.on_link_lost(link)
        if refused is not None:
            await connection.close(refused.code, refused.reason)

    async def _greet(self, connection: ServerConnection) -> Hello:
        """Exchange Hello; raises _Refused for a router of another protocol."""
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await _receive(connection)
        except TimeoutError:
            raise _Refused(CloseCode.POLICY_VIOLATION, "The router did not say Hello in time.") from None
        if not isinstance(hello, Hello):
            raise _Refused(CloseCode.PROTOCOL_ERROR, "The first frame of a link must be Hello.")
        if hello.protocol != PROTOCOL:
            reason = f"This node speaks link protocol {PROTOCOL}, the router {hello.protocol}; run the same version."
            raise _Refused(CloseCode.PROTOCOL_ERROR, reason)
        await connection.send(encode(self._node.hello()))
        return hello

    def _on_frame(self, link: LinkId, frame: ToNode) -> None:
        match frame:
            case Generate():
                self._node.on_generate(link, frame)
            case Cancel():
                self._node.on_cancel(link, frame)
            case Ping():
                self.send(link, [self._node.echo(frame.nonce)])
            case Hello():
                raise _Refused(CloseCode.PROTOCOL_ERROR, "A router says Hello once.")

    # -- HTTP ------------------------------------------------------------------------------------

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """None goes on to the WebSocket handshake."""
        match request.path.partition("?")[0]:
            case "/livez":
                return _respond(connection, admin.livez())
            case "/readyz":
                return _respond(connection, admin.readyz(self._node.facts()))
            case "/metrics":
                if not (self._metrics_open or self._trusted(request)):
                    return self._unauthorised(connection)
                return _respond(connection, admin.metrics(self._node.facts()))
            case "/link":
                if not self._trusted(request):
                    return self._unauthorised(connection)
                if self._certificates and not connection.transport.get_extra_info("peercert"):
                    log.warning("link_without_certificate peer=%s", _peer(connection))
                    return connection.respond(403, "Routers must show a certificate that link.client_ca has signed.\n")
                if len(self._links) >= MAX_LINKS:
                    return connection.respond(503, f"This node has {MAX_LINKS} links already.\n")
                return None
            case _:
                return connection.respond(404, "A node answers /link, /livez, /readyz and /metrics.\n")

    def _trusted(self, request: Request) -> bool:
        if not self._secret:
            return True
        sent = "\n".join(request.headers.get_all("Authorization")).encode(errors="surrogateescape")
        return hmac.compare_digest(sent, f"Bearer {self._secret}".encode(errors="surrogateescape"))

    def _unauthorised(self, connection: ServerConnection) -> Response:
        log.warning("link_unauthorised peer=%s", _peer(connection))
        response = connection.respond(
            401, "The link secret is missing or wrong; send `Authorization: Bearer <secret>`.\n"
        )
        response.headers["WWW-Authenticate"] = "Bearer"
        return response


async def _receive(connection: ServerConnection) -> ToNode:
    data = await connection.recv()
    if isinstance(data, str):
        raise _Refused(CloseCode.UNSUPPORTED_DATA, "The link carries binary frames only.")
    try:
        return decode_to_node(data)
    except FrameError as error:
        raise _Refused(CloseCode.PROTOCOL_ERROR, error.message) from error


def _respond(connection: ServerConnection, answer: admin.Answer) -> Response:
    response = connection.respond(answer.status, answer.body)
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = answer.content_type
    return response


def _peer(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unknown"
