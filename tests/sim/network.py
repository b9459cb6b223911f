"""The way between a router and a node: delays that vary, links that are cut, that stall, or that swallow everything.

Within a link nothing is reordered, and nothing is lost without the link being lost: as over TCP. Frames that were on
their way when a link broke are lost. A wire that swallows (a dead switch) is noticed only by silence, as in
`router/link.py`; what was swallowed can never be mended, so such a link breaks when the wire works again.
"""

from __future__ import annotations

from typing import Protocol

from core.frames import Cancel, Generate, Hello, ToRouter
from router.link import LinkDown, LinkEvent, LinkFrame, LinkRtt, LinkUp
from tests.sim.world import Process, World

RESET_S = 0.002
SILENT_BEATS = 5
NODE_PATIENCE_S = 12.0
"""After how long a node finds that a router has vanished without a word."""


class NodeEnd(Protocol):
    """What the network needs of a node."""

    process: Process

    def hello(self) -> Hello: ...
    def on_link_up(self, connection: Connection) -> None: ...
    def on_link_lost(self, connection: Connection) -> None: ...
    def on_frame(self, connection: Connection, frame: Generate | Cancel) -> None: ...


class RouterEnd(Protocol):
    """What it needs of a router."""

    process: Process

    def on_link_event(self, event: LinkEvent) -> None: ...


class Connection:
    """One link from Hello to its end, which its two sides may notice at different times."""

    def __init__(self, wire: Wire, number: int) -> None:
        self.wire = wire
        self.number = number
        self.router_up = self.node_up = True
        self.lossy = False
        self.heard = True
        self.silent_beats = 0
        self._world = wire.world
        self._router_life, self._node_life = wire.router.process.life, wire.node.process.life
        self._next_to_node_s = self._next_to_router_s = 0.0

    # -- sending -------------------------------------------------------------------------------

    def to_node(self, frame: Generate | Cancel) -> bool:
        """False when the router knows that the link is down."""
        if not self.router_up:
            return False
        if self.wire.swallows_to_node:
            self.lossy = True
            return True
        self._next_to_node_s = self.wire.arrival_s(self._next_to_node_s, self.wire.stalled_to_node_s)
        self._world.at(self._next_to_node_s, self._at_node, frame)
        return True

    def to_router(self, frame: ToRouter) -> None:
        self._tell(LinkFrame(self.wire.node_url, frame))  # type: ignore[arg-type]  # a node says Hello only once

    def _tell(self, event: LinkEvent) -> None:
        if not self.node_up:
            return
        if self.wire.swallows_to_router:
            self.lossy = True
            return
        self._next_to_router_s = self.wire.arrival_s(self._next_to_router_s, self.wire.stalled_to_router_s)
        self._world.at(self._next_to_router_s, self._at_router, event)

    def _at_node(self, frame: Generate | Cancel) -> None:
        if self.node_up:
            self.wire.node.process.now_or_when_awake(self._node_hears, frame)

    def _node_hears(self, frame: Generate | Cancel) -> None:
        if self.node_up:
            self.wire.node.on_frame(self, frame)

    def _at_router(self, event: LinkEvent) -> None:
        if self.router_up:
            self.wire.router.process.now_or_when_awake(self._router_hears, event)

    def _router_hears(self, event: LinkEvent) -> None:
        if self.router_up:
            self.heard = True
            self.wire.router.on_link_event(event)

    # -- beginning and end ---------------------------------------------------------------------

    def open(self) -> None:
        self.wire.node.on_link_up(self)
        self._tell(LinkUp(self.wire.node_url, self.wire.node.hello()))
        self._tell(LinkRtt(self.wire.node_url, self.wire.delay_s * 2))

    def beat(self) -> None:
        """Once a second by the router: counts beats without a word of the node."""
        self.silent_beats = 0 if self.heard else self.silent_beats + 1
        self.heard = False
        if self.silent_beats >= SILENT_BEATS and self.router_up:
            self._world.note("silent links")
            self._router_loses("fell silent")
            if self.wire.swallows_to_node:
                self._world.after(NODE_PATIENCE_S, self.node_loses)
            else:
                self.node_loses()

    def cut(self, reason: str) -> None:
        """Both sides notice at once."""
        self.router_loses(reason)
        self.node_loses()

    def router_loses(self, reason: str) -> None:
        """A frozen router still reads what had arrived before."""
        if self.router_up:
            self.wire.router.process.now_or_when_awake(self._router_loses, reason)

    def _router_loses(self, reason: str) -> None:
        if self.router_up:
            self.router_up = False
            self._world.trace(self.wire.name, f"link {self.number} is down: {reason}")
            self.wire.router.on_link_event(LinkDown(self.wire.node_url, reason))
            self.wire.lost(self)

    def node_loses(self) -> None:
        if self.node_up:
            self.wire.node.process.now_or_when_awake(self._node_loses)

    def _node_loses(self) -> None:
        if self.node_up:
            self.node_up = False
            self.wire.node.on_link_lost(self)

    def forget_router(self) -> None:
        """The router's process is gone: there is nobody to be told there."""
        self.router_up = False
        if self.wire.swallows_to_node:
            self._world.after(NODE_PATIENCE_S, self.node_loses)
        else:
            self._world.after(RESET_S, self.node_loses)

    def forget_node(self) -> None:
        """The node's process is gone. Its machine says so, unless nothing gets through."""
        self.node_up = False
        if not self.wire.swallows_to_router:
            self._world.after(RESET_S, self.router_loses, "the node is gone")


class Wire:
    """The way between one router and one node; there is a link on it whenever there can be one."""

    def __init__(self, world: World, router: RouterEnd, node: NodeEnd, node_url: str, delay_s: float) -> None:
        self.world = world
        self.router = router
        self.node = node
        self.node_url = node_url
        self.name = f"{router.process.name}-{node.process.name}"
        self.delay_s = delay_s
        self.current: Connection | None = None
        self.closed = False
        self.swallows_to_node = self.swallows_to_router = False
        self.stalled_to_node_s = self.stalled_to_router_s = 0.0
        self.connections: list[Connection] = []
        self._count = 0
        self._trying = False

    def arrival_s(self, after_s: float, stalled_until_s: float) -> float:
        """When something that is sent now arrives, which is not before what was sent earlier."""
        jitter = self.world.chance.random()
        sent_s = max(self.world.now, stalled_until_s) + self.delay_s * (0.7 + 0.6 * jitter * jitter * jitter)
        return max(sent_s, after_s)

    def try_soon(self) -> None:
        """Open a link as soon as both are there; the router calls this at the beginning of its life."""
        if not self._trying and self.current is None:
            self._trying = True
            self.world.after(self.world.between(0.02, 0.4), self._try)

    def _try(self) -> None:
        self._trying = False
        if not self.router.process.alive or self.current is not None:
            return
        blocked = self.closed or self.swallows_to_node or self.swallows_to_router
        if blocked or not (self.router.process.works and self.node.process.works):
            self.try_soon()
            return
        self._count += 1
        self.current = Connection(self, self._count)
        self.connections = [one for one in self.connections if one.node_up or one.router_up]
        self.connections.append(self.current)
        self.current.open()

    def lost(self, connection: Connection) -> None:
        if self.current is connection:
            self.current = None
            if self.router.process.alive:
                self.try_soon()

    def send(self, frame: Generate | Cancel) -> bool:
        return self.current is not None and self.current.to_node(frame)

    # -- what happens to wires -----------------------------------------------------------------

    def cut(self) -> None:
        self.world.note("cuts")
        if self.current is not None:
            self.current.cut("cut")

    def stall(self, seconds: float, *, to_node: bool, to_router: bool) -> None:
        """Nothing arrives for a while, then everything at once."""
        self.world.note("stalls")
        self.world.trace(
            self.name, f"stalls for {seconds:.1f} s{' to the node' * to_node}{' to the router' * to_router}"
        )
        if to_node:
            self.stalled_to_node_s = self.world.now + seconds
        if to_router:
            self.stalled_to_router_s = self.world.now + seconds

    def swallow(self, to_node: bool, to_router: bool) -> None:
        self.world.note("swallowing wires")
        self.world.trace(self.name, f"swallows what goes {'to the node ' * to_node}{'to the router' * to_router}")
        self.swallows_to_node |= to_node
        self.swallows_to_router |= to_router

    def heal(self) -> None:
        self.closed = self.swallows_to_node = self.swallows_to_router = False
        self.stalled_to_node_s = self.stalled_to_router_s = 0.0
        for connection in self.connections:
            if connection.lossy:
                connection.cut("what was swallowed cannot be mended")
