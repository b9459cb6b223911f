"""One simulation: a plan's fleet is built, its faults happen, everything heals, and the oracle has the last word."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from router.metrics import Metrics
from tests.fake_store import FakeDatabase
from tests.sim.client import Client
from tests.sim.network import Wire
from tests.sim.node import Node
from tests.sim.oracle import Oracle, Violation
from tests.sim.router import SimRouter
from tests.sim.schedule import Plan, planned
from tests.sim.world import EPOCH_S, World

MOST_S = 120.0
"""Simulated seconds after which a fleet that is still busy hangs."""


class Simulation:
    """The fleet of a plan. `run` raises Violation."""

    def __init__(self, plan: Plan, seed: int, say: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.world = World(seed, say)
        self.oracle = Oracle(self.world)
        self.metrics = Metrics()
        self.nodes = [Node(self.world, build) for build in plan.nodes]
        count = 1 if plan.shared else plan.routers
        self.databases = [
            FakeDatabase(clock=lambda: self.world.now, wall=lambda: EPOCH_S + self.world.now) for _ in range(count)
        ]
        self.routers = [
            SimRouter(
                self.world,
                self.oracle,
                f"r{index}",
                self.databases[0 if plan.shared else index],
                self.metrics,
                plan.store_delay,
            )
            for index in range(plan.routers)
        ]
        self.wires = [self._wire(router, node) for router in range(plan.routers) for node in range(len(self.nodes))]
        self.clients: list[Client] = []
        self.oracle.nodes, self.oracle.databases = self.nodes, self.databases
        for router in self.routers:
            router.peers = {other.name: other for other in self.routers}

    def _wire(self, router_index: int, node_index: int) -> Wire:
        router, node = self.routers[router_index], self.nodes[node_index]
        wire = Wire(self.world, router, node, node.url, self.plan.delays_s[router_index][node_index])
        router.wires[node.url] = wire
        return wire

    def run(self) -> Counter[str]:
        """Let it all happen; how often which things of interest did."""
        world, plan = self.world, self.plan
        for node in self.nodes:
            world.at(0.0, node.boot)
        for router in self.routers:
            world.at(0.0, router.boot)
        for number, asked in enumerate(plan.asked):
            client = Client(world, self.oracle, self.routers, number, asked.request)
            client.manner = asked.manner
            self.clients.append(client)
            world.at(asked.at_s, client.ask)
        faults = Faults(self)
        for fault in plan.faults:
            world.at(fault.at_s, getattr(faults, fault.kind), fault.whom, *fault.args)
        world.at(plan.heals_s, self._heal)
        if not world.run(self._quiet, MOST_S):
            raise Violation(self._what_hangs())
        self.oracle.check_all()
        self._count_moves()
        return world.counts

    def _heal(self) -> None:
        """From here on nothing goes wrong."""
        self.world.trace("world", "heals")
        for database in self.databases:
            database.full = False
        for node in self.nodes:
            node.process.thaw()
            node.recover_engine()
            node.boot()
        for wire in self.wires:
            wire.heal()
        for router in self.routers:
            router.process.thaw()
            router.boot()
        if self.world.now < self.plan.heals_s + 8.0:
            # Who was stopping in order is gone a little later.
            self.world.after(2.0, self._heal)

    def _quiet(self) -> bool:
        return (
            self.world.now > self.plan.heals_s
            and all(client.settled for client in self.clients)
            and all(router.idle and router.serving for router in self.routers)
            and not any(database.running for database in self.databases)
            and all(node.idle for node in self.nodes)
        )

    def _what_hangs(self) -> str:
        busy = [client.name for client in self.clients if not client.settled]
        tables = {router.name: (len(router.sessions), len(router.keeper.journal)) for router in self.routers}
        left = [list(database.running) for database in self.databases]
        streams = {node.build.name: list(node.engine.streams) for node in self.nodes if not node.idle}
        return f"after {MOST_S:g} s: unsettled {busy}, tables and journals {tables}, unfinished {left}, nodes {streams}"

    def _count_moves(self) -> None:
        for family in self.metrics.registry.collect():
            for sample in family.samples:
                name = sample.name.removeprefix("edgechat_router_")
                if name in {"moved_streams_total", "adopted_total", "crossed_variants_total", "dropped_frames_total"}:
                    self.world.note(sample.labels.get("kind", name.removesuffix("_total")), int(sample.value))


class Faults:
    """What can go wrong. whom: any number, counted round. Whoever is hit comes back after `back_s`."""

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation
        self._world = simulation.world

    def _node(self, whom: int) -> Node:
        return self._sim.nodes[whom % len(self._sim.nodes)]

    def _router(self, whom: int) -> SimRouter:
        return self._sim.routers[whom % len(self._sim.routers)]

    def _wire(self, whom: int) -> Wire:
        return self._sim.wires[whom % len(self._sim.wires)]

    def kill_node(self, whom: int, back_s: float) -> None:
        node = self._node(whom)
        node.kill()
        self._world.after(back_s, node.boot)

    def kill_all_nodes(self, _: int, back_s: float) -> None:
        for whom in range(len(self._sim.nodes)):
            self.kill_node(whom, back_s)

    def crash_engine(self, whom: int) -> None:
        node = self._node(whom)
        if node.process.works:
            node.crash_engine()

    def hang_engine(self, whom: int, back_s: float) -> None:
        node = self._node(whom)
        node.hang_engine()
        self._world.after(back_s, node.recover_engine)

    def freeze_node(self, whom: int, back_s: float) -> None:
        node = self._node(whom)
        if node.process.works:
            self._world.note("frozen nodes")
            node.process.freeze()
            self._world.after(back_s, node.process.thaw)

    def drain_node(self, whom: int, back_s: float) -> None:
        node = self._node(whom)
        node.drain()
        self._world.after(node.build.drain_s + 0.3 + back_s, node.boot)

    def cut_wire(self, whom: int, back_s: float) -> None:
        """Not above 0: another link can be opened at once."""
        wire = self._wire(whom)
        wire.cut()
        if back_s > 0:
            wire.closed = True
            self._world.after(back_s, wire.heal)

    def swallow(self, whom: int, back_s: float, which: float) -> None:
        wire = self._wire(whom)
        wire.swallow(to_node=which < 2.0, to_router=which > 1.0)
        self._world.after(back_s, wire.heal)

    def stall_wire(self, whom: int, seconds: float, which: float) -> None:
        self._wire(whom).stall(seconds, to_node=which < 2.0, to_router=which > 1.0)

    def kill_router(self, whom: int, back_s: float) -> None:
        router = self._router(whom)
        router.kill()
        self._world.after(back_s, router.boot)

    def freeze_router(self, whom: int, back_s: float) -> None:
        router = self._router(whom)
        if router.process.works:
            self._world.note("frozen routers")
            router.freeze()
            self._world.after(back_s, router.process.thaw)

    def stop_router(self, whom: int, back_s: float) -> None:
        router = self._router(whom)
        router.shut_down()
        self._world.after(back_s + 0.5, router.boot)

    def fill_store(self, whom: int, back_s: float) -> None:
        database = self._sim.databases[whom % len(self._sim.databases)]
        self._world.note("full stores")
        self._world.trace("world", f"store is full for {back_s:.1f} s")
        database.full = True
        self._world.after(back_s, setattr, database, "full", False)


def simulate(seed: int, say: Callable[[str], None] | None = None) -> Counter[str]:
    """The simulation of a seed; raises Violation, or whatever the code under test raises."""
    with quiet_logs(say):
        return Simulation(planned(seed), seed, say).run()


@contextmanager
def quiet_logs(say: Callable[[str], None] | None) -> Iterator[None]:
    """The routers' logs belong to a trace, and cost more than all the rest where nobody reads them."""
    log = logging.getLogger("router")
    before, propagates = log.level, log.propagate
    handler = _Said(say) if say is not None else logging.NullHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO if say is not None else logging.CRITICAL + 1)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = propagates


class _Said(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"{'':9}  {'log':<10} {record.getMessage()}")
