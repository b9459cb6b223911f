"""What every WebSocket of this router does alike: handshake, outbox, heartbeat, life, orderly close.

Does not know what is said over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from core.stream import Event
from router.errors import UpgradeRequired
from router.http.context import Context, context_of, request_id
from router.http.outbox import PingedOutbox

HEARTBEAT_S = 30.0
CLOSE_TIMEOUT_S = 2.0
HEAR_OUT_S = 5.0
LOOK_AGAIN_S = 0.02
DRAIN_CODE = 1012
FAILED_CODE = 1011
LIFE_CODE = 1001
SLOW_CODE = 1013
SLOW_REASON = b"You read too slowly: reconnect and resume."

log = logging.getLogger(__name__)

# aiohttp warns with the subprotocols a client offered, and one of them may be the client's key.
logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)


def require_upgrade(request: web.Request) -> None:
    """Raises UpgradeRequired for a plain GET of a WebSocket's path."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise UpgradeRequired(request.path)


class _Socket(web.WebSocketResponse):
    """aiohttp's, except that a client that sent too much is heard out, so that it can read why it is closed.

    Closing while bytes are still arriving makes TCP reset, and a reset throws away the close frame.
    Pings and pongs are for the caller of `receive`; the heartbeat needs none of them, for whatever comes in resets it.
    """

    def __init__(self, request: web.Request, protocols: tuple[str, ...]) -> None:
        config = context_of(request).config
        super().__init__(
            protocols=protocols,
            compress=config.listen.compression,
            max_msg_size=config.limits.max_frame_bytes,
            autoping=False,
            heartbeat=HEARTBEAT_S,
            timeout=CLOSE_TIMEOUT_S,
        )
        self._client = request
        self._has_closed = False
        self.silence: Callable[[], object] = lambda: None

    def control(self, kind: WSMsgType, payload: bytes) -> None:
        """Write a control frame behind the frames that are written, without waiting; nothing once a close frame is."""
        transport = self._client.transport
        if transport is not None and not (self.closed or self._has_closed or transport.is_closing()):
            transport.write(bytes((0x80 | kind, len(payload))) + payload)

    async def close(self, *, code: int = 1000, message: bytes = b"", drain: bool = True) -> bool:
        if code == WSCloseCode.MESSAGE_TOO_BIG and not self.closed:
            self._has_closed = True
            self.silence()
            with contextlib.suppress(ConnectionError):
                await self.send_frame(code.to_bytes(2, "big"), WSMsgType.CLOSE)
                await self._hear_out()
        return await super().close(code=code, message=message, drain=drain)

    async def _hear_out(self) -> None:
        """Say that nothing follows and wait for the client to hang up, which cancels this handler."""
        transport = self._client.transport
        if transport is not None and transport.can_write_eof():
            transport.write_eof()
        await asyncio.sleep(HEAR_OUT_S)


class Peer:
    """One client's WebSocket. Invariant: only `run` writes to it, so frames never interleave.

    on_limit: says what the client should be told when its connection has lived long enough.
    """

    def __init__(self, request: web.Request, protocols: tuple[str, ...], on_limit: Callable[[], Event]) -> None:
        self.id = f"conn_{secrets.token_hex(8)}"
        self._request = request
        self._context: Context = context_of(request)
        self._on_limit = on_limit
        self._outbox: PingedOutbox | None = None
        self._close_code = 1000
        self._socket = _Socket(request, protocols)
        self._socket.headers["x-connection-id"] = self.id
        self._socket.headers["x-request-id"] = request_id(request)

    def send(self, *messages: Event) -> None:
        """Queue JSON text frames that are said in one go; never waits."""
        if self._outbox is not None:
            self._outbox.put(*map(msgspec.json.encode, messages))

    async def caught_up(self) -> None:
        """Wait while the client is far behind; for what can wait, such as what another router has."""
        most_bytes = self._context.config.limits.slow_reader_bytes // 2
        while self._outbox is not None and self._outbox.open and self._outbox.unread_bytes > most_bytes:
            await asyncio.sleep(LOOK_AGAIN_S)

    async def close(self, code: int) -> None:
        """Write what is queued, then close."""
        self._close_code = code
        if self._outbox is not None:
            self._outbox.finish()

    async def run(self, on_text: Callable[[str], None], on_binary: Callable[[], None]) -> web.WebSocketResponse:
        """Serve until either side closes; returns the spent response for the handler to return."""
        await self._socket.prepare(self._request)
        self._outbox = outbox = self._context.new_pinged_outbox(self._request, self._ping, self._say_too_slow)
        self._context.peers.add(self)
        writer = asyncio.create_task(self._write(outbox), name=f"write {self.id}")
        self._socket.silence = writer.cancel
        life_s = self._context.config.limits.connection_life_s
        expiry = asyncio.get_running_loop().call_later(life_s, self._expire)
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    on_text(message.data)
                elif message.type is WSMsgType.BINARY:
                    on_binary()
                elif message.type is WSMsgType.PING:
                    # The pong waits for room, or a client could fill our memory with answers that it does not read.
                    with contextlib.suppress(ConnectionError):
                        await self._socket.pong(message.data)
                elif message.type is WSMsgType.PONG:
                    outbox.on_pong(bytes(message.data))
        except Exception:
            # The handshake is long answered: a close code is all that is left to say.
            log.exception("the connection %s failed", self.id)
            await self._socket.close(code=FAILED_CODE)
        finally:
            expiry.cancel()
            writer.cancel()
            self._context.peers.discard(self)
            self._context.outboxes.discard(outbox)
            with contextlib.suppress(asyncio.CancelledError):
                await writer
        return self._socket

    def _expire(self) -> None:
        self.send(self._on_limit())
        self._close_code = LIFE_CODE
        if self._outbox is not None:
            self._outbox.finish()

    def _ping(self, payload: bytes) -> None:
        self._socket.control(WSMsgType.PING, payload)

    def _say_too_slow(self) -> None:
        self._socket.control(WSMsgType.CLOSE, SLOW_CODE.to_bytes(2, "big") + SLOW_REASON)

    async def _write(self, outbox: PingedOutbox) -> None:
        async def write(frame: bytes) -> None:
            await self._socket.send_frame(frame, WSMsgType.TEXT)

        # A client that is gone ends the receiving side too, which ends this task.
        with contextlib.suppress(ConnectionError):
            if await outbox.drain(write):
                await self._socket.close(code=self._close_code)
