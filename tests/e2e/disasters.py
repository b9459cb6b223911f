"""What can happen to a node while it answers, and how all is made well again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e.processes import HOST, READY_S, Fleet, Node, Router
from tests.e2e.waiting import eventually
from tests.e2e.wire import Wire

NEVER_S = "600"
"""Longer than any test: where a test must not pass because somebody's patience ended."""


class WiredNode(Node):
    """A node that routers reach over a wire."""

    def __init__(self, name: str, release: Path, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(name, release, folder, settings=settings)
        self.wire = Wire(lambda: self.port)

    @property
    def link_url(self) -> str:
        """The wire's near end."""
        return f"ws://{HOST}:{self.wire.port}"

    def close(self) -> None:
        """End the node, then its wire."""
        super().close()
        self.wire.close()


@dataclass(slots=True)
class WiredFleet(Fleet):
    """Nodes on wires and one router, without Consul. folder: where the link's secret lies."""

    folder: Path

    def node(self, name: str) -> WiredNode:
        """Return the node of this name."""
        node = self.nodes[name]
        assert isinstance(node, WiredNode)
        return node

    def mend(self) -> None:
        """Undo every disaster, and wait until the router sees all nodes ready and idle."""
        for name in self.nodes:
            node = self.node(name)
            node.wire.heal()
            if node.running:
                go_on(node)
            else:
                node.start()
        if not self.router.running:
            self.router.start()
        for process in (*self.nodes.values(), self.router):
            process.wait_ready()
        eventually(self.all_idle, READY_S, "all nodes are ready again and have nothing to do")

    def all_idle(self) -> bool:
        """Tell whether all nodes are ready and none answers anything."""
        return self.all_ready() and not any(node["running"] for node in self.router.fleet())


def wired_fleet(
    release: Path,
    folder: Path,
    names: Sequence[str],
    *,
    edge: Mapping[str, str] | None = None,
    router: Mapping[str, str] | None = None,
    kind: type[WiredNode] = WiredNode,
) -> WiredFleet:
    """Put it together without starting it; `edge` and `router` are further keys."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes: dict[str, Node] = {name: kind(name, release, folder, settings=edge) for name in names}
    return WiredFleet(None, nodes, Router(folder, nodes=list(nodes.values()), settings=router), folder)


def go_on(node: Node) -> None:
    """Let all its processes run that were stopped."""
    for process in (psutil.Process(node.pid), *node.children()):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def kill_parent(node: WiredNode) -> None:
    """`kill -9` of the process that holds the links; its engine ends with it."""
    node.kill()


def kill_engine(node: WiredNode) -> None:
    """`kill -9` of the process that computes; the node starts another."""
    node.kill_engine()


def stop_parent(node: WiredNode) -> None:
    """The process that holds the links does nothing any more, and no connection is closed."""
    node.signal(signal.SIGSTOP)


def stop_engine(node: WiredNode) -> None:
    """The process that computes does nothing any more; the node goes on saying how it is."""
    node.engine().suspend()


def cut_wire(node: WiredNode) -> None:
    """The link is reset, and cannot be opened again."""
    node.wire.cut()


def silence_wire(node: WiredNode) -> None:
    """Nothing arrives any more on either side."""
    node.wire.silence()


DISASTERS: tuple[Callable[[WiredNode], None], ...] = (
    kill_parent,
    kill_engine,
    stop_parent,
    stop_engine,
    cut_wire,
    silence_wire,
)
