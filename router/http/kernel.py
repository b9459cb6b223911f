"""What the system holds for a client beneath its transport, and how much of that there may be.

Does not know what is sent or why it is not taken.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import termios

# Linux doubles it for its own bookkeeping: a stalled client then holds about 300 KB there, by itself 4 MB and more.
SEND_BUFFER_BYTES = 128 * 1024


def unacknowledged_bytes(transport: asyncio.BaseTransport) -> int:
    """What was written to the socket and the client's machine has not confirmed (SIOCOUTQ); 0 once it is closed."""
    connection = _socket_of(transport)
    if connection is None:
        return 0
    held = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, held)
    return held[0]


def bound_send_buffer(transport: asyncio.BaseTransport) -> None:
    """Let the system take no more than about twice `SEND_BUFFER_BYTES` for a client that reads nothing."""
    connection = _socket_of(transport)
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def forget_within(transport: asyncio.BaseTransport, most_s: float) -> None:
    """What is not taken within this time of closing is thrown away; by itself Linux tries for minutes."""
    connection = _socket_of(transport)
    if connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(most_s * 1000))


def _socket_of(transport: asyncio.BaseTransport) -> socket.socket | None:
    """The open TCP socket beneath, which TLS has too."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    return connection if connection is not None and connection.fileno() >= 0 else None
