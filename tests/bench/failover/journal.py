"""What writing ahead costs: how late each token is, and how many events a router can tell."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench.engine.rows import Found, Row, Scale, row, tell
from tests.bench.failover.paced import PacedNode, count, listen, started
from tests.bench.failover.paced_node import Pace
from tests.bench.failover.rig import spread
from tests.e2e.processes import Fleet, Redis

STEP_S = 0.01
STREAMS = (1, 8)
# Where the client is slower than the router, that is no reason to close it.
PATIENT = {"ROUTER__LIMITS__SLOW_READER_BYTES": str(2**30)}


class Candidate(NamedTuple):
    """A router and whether its answers are stored."""

    name: str
    fleet: Fleet
    store: bool


def measure(scale: Scale) -> Found:
    """All candidates in turn, several times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node, redis = PacedNode("paced", folder, folder), Redis(folder)
        routers: list[Fleet] = []
        try:
            for process in (node, redis):
                process.start().wait_ready()
            for kind, settings in {
                "sqlite": {},
                "power": {"ROUTER__STORE__DURABILITY": "power"},
                "redis": {"ROUTER__STORE__REDIS": redis.redis_url},
            }.items():
                routers.append(started(folder, kind, node, {**PATIENT, **settings}))
            sqlite, power, shared = routers
            candidates = [
                Candidate("nothing (`store: false`)", sqlite, False),
                Candidate("SQLite", sqlite, True),
                Candidate('SQLite, durability "power"', power, True),
                Candidate("Redis, appendonly", shared, True),
            ]
            return asyncio.run(_measure(candidates, scale))
        finally:
            for fleet in routers:
                fleet.router.close()
            redis.close()
            node.close()


async def _measure(candidates: list[Candidate], scale: Scale) -> Found:
    rows: list[Row] = []
    for streams in STREAMS:
        late_ms: dict[str, list[float]] = {each.name: [] for each in candidates}
        for number in range(scale(3, 1)):
            tell(f"{streams} streams, round {number + 1}")
            for each in candidates:
                pace, ids = Pace(STEP_S), scale(200, 20)
                heard = await asyncio.gather(*(listen(each.fleet, pace, ids, store=each.store) for _ in range(streams)))
                late_ms[each.name] += [ms for late in heard for ms in late.ms]
        for name, values in late_ms.items():
            rows += spread(f"from node to client, {streams} streams, journal: {name}", values, "ms", digits=2)
    rates: dict[str, list[float]] = {each.name: [] for each in candidates}
    for number in range(scale(4, 1)):
        tell(f"as fast as can be, round {number + 1}")
        for each in candidates:
            rates[each.name].append(await _events_s(each, scale(4000, 50)))
    rows += [
        row(f"events through the router, 8 streams, journal: {name}", v, "/s", None, 0) for name, v in rates.items()
    ]
    notes = [
        "A node without an engine that says an id every 10 ms for each stream, one frame a step, or as many as the "
        "router takes; each id carries the moment at which it was said. One router for each store; node and client "
        "share the cores with it.",
        "The journal's cost per step is the difference to `store: false`. SQLite commits once for all that waits, with "
        'synchronous = NORMAL; "power" waits for the disk; Redis with appendonly, appendfsync everysec, is beside it.',
    ]
    return Found("journal", "The journal", rows, notes)


async def _events_s(candidate: Candidate, ids: int) -> float:
    began_s = time.perf_counter()
    events = await asyncio.gather(
        *(count(candidate.fleet, Pace(0.0), ids, store=candidate.store) for _ in range(max(STREAMS)))
    )
    return sum(events) / (time.perf_counter() - began_s)
