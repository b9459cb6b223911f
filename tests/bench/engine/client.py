"""A measuring client of the whole product, and the fleet that it measures."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import websockets

from tests.bench.engine.loops import MODEL
from tests.bench.report import THREADS
from tests.e2e.processes import Fleet, Node, build_fleet

NODE = "eu"
_ENDS = {"response.completed", "response.incomplete"}
_FAILURES = {"response.failed", "error"}


@dataclass
class Heard:
    """One response as its client saw it. times_s: of each delta of text; id_s: of the first id, text or not."""

    asked_s: float = 0.0
    id_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    response: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def first_id_s(self) -> float:
        """Seconds from the question to the first id."""
        return self.id_s - self.asked_s

    @property
    def output_tokens(self) -> int:
        return 0 if self.refused else int(self.response["usage"]["output_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int(self.response["usage"]["input_tokens_details"]["cached_tokens"])

    @property
    def input_tokens(self) -> int:
        return int(self.response["usage"]["input_tokens"])


@contextlib.contextmanager
def product(release: Path, edge: Mapping[str, str] | None = None, threads: int = THREADS) -> Iterator[Fleet]:
    """A router and one node; its keys as in configs/edge.toml, but for these."""
    with tempfile.TemporaryDirectory() as name:
        settings = {
            "EDGE__ENGINE__THREADS": str(threads),
            "EDGE__ENGINE__CONTEXT_TOKENS": "4096",
            **(edge or {}),
        }
        fleet = build_fleet(release, Path(name), None, nodes=[NODE], edge=settings)
        try:
            yield fleet.start()
        finally:
            fleet.close()


def connection(fleet: Fleet) -> websockets.connect:
    """A WebSocket to the router."""
    url = fleet.base_url.replace("http", "ws", 1) + "/responses"
    return websockets.connect(url, additional_headers={"Authorization": "Bearer dev"}, compression=None, proxy=None)


async def ask(socket: websockets.ClientConnection, **fields: object) -> Heard:
    """One response to its end, or to its refusal."""
    heard = Heard(asked_s=time.perf_counter())
    body = {"type": "response.create", "model": MODEL, "store": False, **fields}
    await socket.send(json.dumps(body))
    async for message in socket:
        now_s, event = time.perf_counter(), json.loads(message)
        kind = event["type"]
        if kind == "response.output_item.added" and not heard.id_s:
            heard.id_s = now_s
        elif kind == "response.output_text.delta":
            heard.times_s.append(now_s)
        elif kind in _ENDS or kind in _FAILURES:
            heard.ended_s = now_s
            heard.response = event.get("response") or {}
            heard.refused = json.dumps(event.get("error") or event) if kind in _FAILURES else ""
            return heard
    raise SystemExit("bench: the router closed the connection")


async def answered(fleet: Fleet, **fields: object) -> Heard:
    """The same over a connection of its own; raises SystemExit when it was refused."""
    async with connection(fleet) as socket:
        heard = await ask(socket, **fields)
    if heard.refused:
        raise SystemExit(f"bench: the router answered {heard.refused}")
    return heard


def engine_of(fleet: Fleet) -> psutil.Process:
    return fleet.node(NODE).engine()


def pin(process: psutil.Process, cores: set[int]) -> None:
    """Hold all threads of a process to these cores; threads that it starts later inherit them."""
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def pin_apart(fleet: Fleet, engine_cores: set[int], other_cores: set[int]) -> None:
    """The engine on its cores; node, router and this client on the others."""
    node: Node = fleet.node(NODE)
    pin(engine_of(fleet), engine_cores)
    for pid in (node.pid, fleet.router.pid, os.getpid()):
        pin(psutil.Process(pid), other_cores)
