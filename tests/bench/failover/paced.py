"""Routers in front of a paced node, and clients that measure how late a token is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tests.bench.engine.client import connection
from tests.bench.failover.paced_node import MODEL, Pace
from tests.e2e.processes import Fleet, Node, Router
from tests.e2e.waiting import eventually


class PacedNode(Node):
    """tests/bench/failover/paced_node.py as a process."""

    def argv(self) -> Sequence[str]:
        return [sys.executable, "-m", "tests.bench.failover.paced_node", "--port", str(self.port)]


def started(folder: Path, name: str, node: Node, settings: dict[str, str]) -> Fleet:
    """One more router in front of the node."""
    router = Router(folder, name=name, nodes=[node], settings=settings)
    fleet = Fleet(None, {"paced": node}, router)
    router.start().wait_ready()
    eventually(fleet.all_ready)
    return fleet


def asked(pace: Pace, ids: int, *, store: bool) -> str:
    """A request for so many ids at that pace."""
    body = {"type": "response.create", "model": MODEL, "input": msgspec.json.encode(pace).decode()}
    return json.dumps({**body, "max_output_tokens": ids, "store": store})


@dataclass
class Late:
    """ms: how long after the node had said it each token was here. gaps_ms: between two. first_ms: to the first."""

    ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    first_ms: float = 0.0


async def listen(fleet: Fleet, pace: Pace, ids: int, *, store: bool) -> Late:
    """One answer, every token of which is looked at."""
    late, before_ns = Late(), 0
    async with connection(fleet) as socket:
        asked_ns = time.monotonic_ns()
        await socket.send(asked(pace, ids, store=store))
        async for message in socket:
            now_ns, event = time.monotonic_ns(), json.loads(message)
            match event["type"]:
                case "response.output_text.delta":
                    late.ms.append((now_ns - int(event["delta"].split()[0])) / 1e6)
                    if before_ns:
                        late.gaps_ms.append((now_ns - before_ns) / 1e6)
                    else:
                        late.first_ms = (now_ns - asked_ns) / 1e6
                    before_ns = now_ns
                case "response.incomplete":
                    return late
                case "error" | "response.failed":
                    raise SystemExit(f"bench: the router answered {event}")
    raise SystemExit("bench: the router closed the connection")


async def count(fleet: Fleet, pace: Pace, ids: int, *, store: bool) -> int:
    """One answer, as cheaply for the client as can be; how many events it had."""
    events = 0
    async with connection(fleet) as socket:
        await socket.send(asked(pace, ids, store=store))
        async for message in socket:
            events += 1
            assert isinstance(message, str)
            if message.startswith(('{"type":"response.incomplete"', '{"type":"error"', '{"type":"response.failed"')):
                if not message.startswith('{"type":"response.incomplete"'):
                    raise SystemExit(f"bench: the router answered {message}")
                return events
    raise SystemExit("bench: the router closed the connection")
