"""Whether clients that stop reading are noticed by those that read, and what they cost the router."""

from __future__ import annotations

import asyncio
import socket
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.bench.engine.rows import Found, Row, Scale, row, tell
from tests.bench.failover.paced import Late, PacedNode, asked, count, listen, started
from tests.bench.failover.paced_node import Pace
from tests.bench.failover.rig import rss_mib, spread
from tests.e2e.processes import HOST, Fleet
from tests.e2e.waiting import http

READERS = 8
READERS_PACE = Pace(0.02)
OTHERS_STEP_S = 0.25
OTHERS_IDS = 10_000
"""More than anybody is there for."""
RECEIVE_BUFFER_BYTES = 8192


class Round(NamedTuple):
    """What the readers had while the others did something. most_mib: the router's memory at its most."""

    readers: list[Late]
    most_mib: float


def measure(scale: Scale) -> Found:
    """Rounds of: the readers alone, beside others who read, beside others who do not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = PacedNode("paced", folder, folder)
        node.start().wait_ready()
        settings = {"ROUTER__LIMITS__SLOW_READER_S": str(scale(10, 3)), "ROUTER__SESSION__ORPHAN_GRACE_S": "1"}
        fleet = started(folder, "stalled", node, settings)
        try:
            return asyncio.run(_measure(fleet, scale))
        finally:
            fleet.router.close()
            node.close()


async def _measure(fleet: Fleet, scale: Scale) -> Found:
    others, ids = scale(200, 20), scale(600, 50)
    begun_mib = rss_mib(fleet.router.pid)
    rounds: dict[str, list[Round]] = {
        "alone": [],
        f"beside {others} who read": [],
        f"beside {others} who do not": [],
    }
    for number in range(scale(2, 1)):
        tell(f"round {number + 1}")
        for kind, seen in zip((_alone, _reading, _stalled), rounds.values(), strict=True):
            seen.append(await kind(fleet, others, ids))
            await _until(fleet, 0)
    rows: list[Row] = []
    for what, seen in rounds.items():
        readers = [late for each in seen for late in each.readers]
        rows += spread(f"between two tokens, {what}", [ms for late in readers for ms in late.gaps_ms], "ms", digits=2)
        rows += spread(f"from node to client, {what}", [ms for late in readers for ms in late.ms], "ms", digits=2)
        rows.append(row(f"first token, {what}", [late.first_ms for late in readers], "ms", digits=2))
        rows.append(row(f"router, at its most, {what}", [each.most_mib for each in seen], "MiB"))
    rows.append(row("router, before", [begun_mib], "MiB"))
    rows.append(row("router, in the end", [rss_mib(fleet.router.pid)], "MiB"))
    rows.append(row("closed as too slow", [float(_closed(fleet))], "connections", digits=0))
    notes = [
        f"{READERS} readers of an id every 20 ms from a node without an engine, whose first comes with its next step. "
        "The others are told 300 bytes about four times a second, each at moments of its own; who does not read holds "
        f"8 KiB unread in its system and is closed after {scale(10, 3)} s (the default is 20 s), while the readers are "
        "measured. All is stored in SQLite.",
    ]
    return Found("stalled", "Clients that stop reading", rows, notes)


def _pace(other: int) -> Pace:
    """Each has its own, or all would be told at the same moment."""
    return Pace(OTHERS_STEP_S + other / 10_000, pad=256)


async def _alone(fleet: Fleet, others: int, ids: int) -> Round:
    return await _watched(fleet, ids)


async def _reading(fleet: Fleet, others: int, ids: int) -> Round:
    """They are there before the readers come and until those have all."""
    beside = [asyncio.create_task(count(fleet, _pace(other), OTHERS_IDS, store=True)) for other in range(others)]
    await _until(fleet, others)
    found = await _watched(fleet, ids)
    for other in beside:
        other.cancel()
    await asyncio.wait(beside)
    return found


async def _stalled(fleet: Fleet, others: int, ids: int) -> Round:
    sockets = [await _asking(fleet, _pace(other)) for other in range(others)]
    await _until(fleet, others)
    found = await _watched(fleet, ids)
    for stalled in sockets:
        stalled.close()
    return found


async def _until(fleet: Fleet, streams: int) -> None:
    """Wait until so many streams are running, no more and no less."""
    while (await asyncio.to_thread(fleet.router.fleet))[0]["running"] != streams:
        await asyncio.sleep(0.1)


async def _watched(fleet: Fleet, ids: int) -> Round:
    watch = asyncio.create_task(_most_mib(fleet.router.pid))
    readers = await asyncio.gather(*(listen(fleet, READERS_PACE, ids, store=True) for _ in range(READERS)))
    watch.cancel()
    await asyncio.wait([watch])
    return Round(readers, watch.result())


async def _most_mib(pid: int) -> float:
    most = rss_mib(pid)
    try:
        while True:
            most = max(most, rss_mib(pid))
            await asyncio.sleep(0.2)
    except asyncio.CancelledError:
        return most


async def _asking(fleet: Fleet, pace: Pace) -> socket.socket:
    """A client that asks for a long answer and never reads it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (HOST, fleet.router.port))
    head = (
        "GET /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer dev\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await loop.sock_sendall(connection, head.encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += await loop.sock_recv(connection, 1)
    body = asked(pace, OTHERS_IDS, store=True).encode()
    # One text frame, masked with zeros.
    await loop.sock_sendall(connection, struct.pack("!BBHI", 0x81, 0x80 | 126, len(body), 0) + body)
    return connection


def _closed(fleet: Fleet) -> int:
    """How many connections the router has closed because they read too slowly, by its own count."""
    told = http(f"{fleet.url}/metrics").body.decode()
    [line] = [line for line in told.splitlines() if line.startswith("edgechat_router_slow_readers_total ")]
    return int(float(line.split()[1]))
