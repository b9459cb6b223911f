"""A client that does over its socket only what a test tells it: it reads when told, and answers no ping by itself."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.router.fakes import MODEL

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
RECEIVE_BUFFER_BYTES = 8192


class RawClient:
    """Holds unread at most `RECEIVE_BUFFER_BYTES` in its system and a little in its stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def upgrade(self) -> None:
        """Become Alice's WebSocket at /v1/responses."""
        self._writer.write(
            b"GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer alice\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert b" 101 " in await self.head()

    async def head(self) -> bytes:
        """Read the head of an HTTP answer."""
        return await self._reader.readuntil(b"\r\n\r\n")

    def ask(self, **fields: Any) -> None:
        """Ask for an answer over the WebSocket."""
        self.send(TEXT, json.dumps({"type": "response.create", "model": MODEL, "input": "hi"} | fields).encode())

    def post(self, **fields: Any) -> None:
        """Ask for an answer as server-sent events."""
        body = json.dumps({"model": MODEL, "input": "hi", "stream": True} | fields).encode()
        head = "POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer alice\r\n"
        self._writer.write(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )

    def send(self, kind: int, payload: bytes) -> None:
        """Send one frame, masked with zeros."""
        assert len(payload) < 126
        self._writer.write(bytes((0x80 | kind, 0x80 | len(payload), 0, 0, 0, 0)) + payload)

    async def frame(self) -> tuple[int, bytes]:
        """Read one frame: its kind and payload; raises IncompleteReadError where the connection ends."""
        first, size = await self._reader.readexactly(2)
        if size == 126:
            (size,) = struct.unpack("!H", await self._reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self._reader.readexactly(8))
        return first & 0x0F, await self._reader.readexactly(size)

    async def some(self, most_bytes: int) -> bytes:
        """Read what there is; empty = the connection has ended."""
        return await self._reader.read(most_bytes)


@asynccontextmanager
async def raw_client(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[RawClient]:
    """Connect; upgrade or post is for the test."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    name = "127.0.0.1" if tls is not None else None
    reader, writer = await asyncio.open_connection(sock=connection, ssl=tls, server_hostname=name, limit=1024)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
