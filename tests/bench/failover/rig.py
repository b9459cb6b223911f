"""Two real nodes behind a router, and a router for each alone; clients that note when each event came."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import websockets

from tests.bench.engine.client import ask, connection
from tests.bench.engine.loops import MODEL, endless
from tests.bench.engine.rows import Row, Target, row
from tests.e2e.disasters import NEVER_S, go_on
from tests.e2e.processes import READY_S, Fleet, Node, Router
from tests.e2e.waiting import eventually

NODES = ("eu", "us")
PROMPT_WORDS = 320
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 1}
EDGE = {
    # Two engines, a router and a client share the cores.
    "EDGE__ENGINE__THREADS": "1",
    # A guess that is right brings several ids at once, of which a pause could not be told.
    "EDGE__ENGINE__SPECULATION": "false",
    # Whoever does not ask for `exact` is continued in a hurry.
    "EDGE__ENGINE__FAILOVER_EXACT_S": "0",
    "EDGE__ENGINE__VERIFY": "false",
    "EDGE__NODE__DRAIN_S": NEVER_S,
}


@dataclass
class Rig:
    """fleet: both nodes. alone: by node, a router that knows no other."""

    fleet: Fleet
    alone: dict[str, Fleet]
    prompts: int = 0

    def prompt(self) -> str:
        """Somewhat more than PROMPT_WORDS tokens that no other prompt begins with."""
        self.prompts += 1
        return f"Story {self.prompts}. " + "river stone bread cloud " * (PROMPT_WORDS // 4) + "Tell me more."

    def mend(self) -> None:
        """Start what was killed, wake what was stopped, and wait until every router trusts every node."""
        for node in self.fleet.nodes.values():
            if node.running:
                go_on(node)
            else:
                node.start()
            node.wait_ready()
        for fleet in (self.fleet, *self.alone.values()):
            eventually(lambda fleet=fleet: _idle(fleet), READY_S, "all nodes are there and idle")  # type: ignore[misc]


def _idle(fleet: Fleet) -> bool:
    return fleet.all_ready() and not any(node["running"] for node in fleet.router.fleet())


@contextmanager
def rig() -> Iterator[Rig]:
    """Start it, end it."""
    with tempfile.TemporaryDirectory() as name:
        folder, release = Path(name), endless()
        nodes = {node: Node(node, release, folder, settings=EDGE) for node in NODES}
        fleet = Fleet(None, nodes, Router(folder, nodes=list(nodes.values())))
        alone = {
            name: Fleet(None, {name: node}, Router(folder, name=name, nodes=[node])) for name, node in nodes.items()
        }
        try:
            fleet.start()
            for each in alone.values():
                each.router.start().wait_ready()
            made = Rig(fleet, alone)
            made.mend()
            yield made
        finally:
            for each in alone.values():
                each.router.close()
            fleet.close()


@dataclass
class Move:
    """One answer that went from one node to another. Seconds of `time.perf_counter`.

    struck_s: when something was done to the node. moved_s: when the client was told of the other one.
    """

    struck_s: float = 0.0
    moved_s: float = 0.0
    nodes: list[str] = field(default_factory=list)
    before_s: list[float] = field(default_factory=list)
    after_s: list[float] = field(default_factory=list)

    @property
    def detected_ms(self) -> float:
        """From the stroke to the client's knowing of the other node."""
        return 1e3 * (self.moved_s - self.struck_s)

    @property
    def pause_ms(self) -> float:
        """Between the last piece of text from the one node and the first from the other."""
        return 1e3 * (self.after_s[0] - self.before_s[-1])

    @property
    def step_ms(self) -> float:
        """Between two pieces, before."""
        return 1e3 * median(later - earlier for earlier, later in pairwise(self.before_s))

    @property
    def to_first_ms(self) -> float:
        """From the client's knowing of the other node to its first piece."""
        return 1e3 * (self.after_s[0] - self.moved_s)


async def moved(rig: Rig, strike: Callable[[Node], None], text: str, pieces: int, **fields: Any) -> Move:
    """Ask, do something to the node after so many pieces of text, and listen until the other one has said a few."""
    move = Move()
    url = rig.fleet.base_url.replace("http", "ws", 1) + "/responses"
    async with websockets.connect(
        url,
        additional_headers={"Authorization": "Bearer dev"},
        subprotocols=["responses.v1.json", "edgechat.ext.v1"],  # type: ignore[list-item]  # plain strings are fine
        compression=None,
        proxy=None,
    ) as socket:
        body = {"type": "response.create", "model": MODEL, "input": text, "max_output_tokens": pieces * 2 + 32}
        await socket.send(json.dumps({**body, **SAMPLED, **fields}))
        async for message in socket:
            now_s, event = time.perf_counter(), json.loads(message)
            match event["type"]:
                case "edgechat:node":
                    move.nodes.append(event["node"])
                    move.moved_s = now_s
                case "response.output_text.delta" if len(move.nodes) == 1:
                    move.before_s.append(now_s)
                    if len(move.before_s) == pieces:
                        move.struck_s = time.perf_counter()
                        strike(rig.fleet.node(move.nodes[0]))
                case "response.output_text.delta":
                    move.after_s.append(now_s)
                    if len(move.after_s) == 4:
                        await socket.send(json.dumps({"type": "response.cancel", "response_id": event_id(event)}))
                        return move
                case "error" | "response.failed":
                    raise SystemExit(f"bench: the router answered {event}")
    raise SystemExit("bench: the answer ended before it had moved")


def event_id(event: dict[str, Any]) -> str:
    """The response that an event of a message belongs to."""
    return "resp_" + str(event["item_id"]).removeprefix("msg_").rpartition("_")[0]


async def first_ms(fleet: Fleet, text: str, *, known: bool | None = None) -> float:
    """Time to the first id of an answer to this prompt; known: whether the node must have had its beginning."""
    async with connection(fleet) as socket:
        heard = await ask(socket, input=text, max_output_tokens=1)
    if heard.refused:
        raise SystemExit(f"bench: the router answered {heard.refused}")
    if known is not None and known != (heard.cached_tokens > PROMPT_WORDS // 2):
        raise SystemExit(f"bench: {heard.cached_tokens} of {heard.input_tokens} tokens were known to the node")
    return 1e3 * heard.first_id_s


def spread(what: str, values: list[float], unit: str, target: Target | None = None, digits: int = 1) -> list[Row]:
    """Median with range, and p99, for which there is the same target."""
    p99 = quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]
    return [row(f"{what}, p50", values, unit, target, digits), row(f"{what}, p99", [p99], unit, target, digits)]


def rss_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20
