"""A router in simulated time: the real Sessions, Session, Fleet, policy, Journal, Keeper and Finder, driven by events.

What is replaced is what waits: the store answers after a delay, tasks are `world.Process.spawn`'s, links are wires.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from core.conversation import prefix_keys
from core.errors import NoNodeAvailable, StoreUnavailable
from core.frames import Cancel, Generate
from core.stream import RequestRecord
from router.errors import Draining, ResponseMoved, RouterUnreachable
from router.finder import Elsewhere, Finder, Here
from router.fleet import STATUS_PERIOD_S, Fleet
from router.journal import HEARTBEAT_S, Entry, Outcome, Owned, StoredResponse, Unfinished
from router.keeper import Keeper
from router.link import LinkEvent
from router.metrics import Metrics
from router.policy import choose
from router.session import Instant
from router.sessions import Reader, Running, Sessions
from router.shelf import Shelf
from tests.fake_store import FakeDatabase, FakeStore
from tests.sim.network import Wire
from tests.sim.node import Node
from tests.sim.world import EPOCH_S, Process, Sleep, Task, World

if TYPE_CHECKING:
    from tests.sim.oracle import Oracle

TENANT = "acme"
ORPHAN_GRACE_S = 4.0
FAILOVER_WAIT_S = 5.0
LINK_BEAT_S = 1.0
CLOSING_S = 5.0


class SlowStore:
    """The store of one life of a router: what it is asked takes time, and what it was asked outlives the router.

    A write is done by the database at one moment, answered at a later one; who is killed in between never hears of
    it. Who is killed before the first moment may have had it on its way already: chance decides. A claim comes after
    the writes that were begun before it, as with SQLite's one thread; Redis' epochs fence such writes instead.
    """

    def __init__(self, router: SimRouter, database: FakeDatabase, instance: str) -> None:
        self.store = FakeStore(database, router.name, instance)
        self._router = router
        self._world = router.world
        self._life = router.process.life
        self._written_at_s = 0.0

    def _some(self, most_s: float) -> float:
        return self._world.chance.random() * most_s * self._router.store_delay

    async def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        answer: list[list[Outcome] | StoreUnavailable] = []
        delay_s = self._some(0.02)
        self._written_at_s = self._world.now + delay_s
        self._world.after(delay_s, self._apply, list(entries), answer, self._world.maybe(0.5))
        await Sleep(delay_s + self._some(0.02))
        (outcome,) = answer
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    def _apply(
        self, entries: list[Entry], answer: list[list[Outcome] | StoreUnavailable], was_on_its_way: bool
    ) -> None:
        if self._router.process.life != self._life and not was_on_its_way:
            self._world.note("batches that died")
            return
        try:
            outcomes = self.store.write_now(entries)
        except StoreUnavailable as error:
            self._world.note("refused writes")
            answer.append(error)
            return
        answer.append(outcomes)
        self._router.oracle.wrote(self._router, self.store.owner, entries, outcomes)

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        await Sleep(self._some(0.01))
        stored = self.store.get_now(tenant, response_id)
        await Sleep(self._some(0.01))
        return stored

    async def delete(self, tenant: str, response_id: str) -> bool:
        await Sleep(self._some(0.01))
        deleted = self.store.delete_now(tenant, response_id)
        await Sleep(self._some(0.01))
        return deleted

    async def claim(self, tenant: str, response_id: str) -> Unfinished | Owned | None:
        await Sleep(max(self._some(0.01), self._written_at_s - self._world.now))
        before = self.store.database.running.get(response_id)
        owner = None if before is None else before.owner
        claimed = self.store.claim_now(tenant, response_id)
        if isinstance(claimed, Unfinished) and owner is not None:
            self._router.oracle.claimed(self._router, self.store.owner, owner, claimed)
        await Sleep(self._some(0.01))
        return claimed

    async def unclaimed(self) -> list[tuple[str, str]]:
        await Sleep(self._some(0.01))
        return self.store.unclaimed_now()

    async def beat(self) -> None:
        await Sleep(self._some(0.01))
        self.store.beat_now(self._world.now)
        self._router.oracle.beat(self.store.owner)

    async def release(self) -> None:
        self.store.release_now()
        self._router.oracle.released(self.store.owner)

    async def close(self) -> None:
        await self.store.close()


class SimKeeper(Keeper):
    """Writes by a simulated task."""

    def __init__(self, router: SimRouter, store: SlowStore, on_refused: Any) -> None:
        super().__init__(store, on_refused)
        self._router = router

    def _commit(self, batch: list[Entry]) -> None:
        self._idle.clear()
        self._router.process.later(0.0, lambda: self._router.process.spawn(self._write(batch)))


class SimFinder(Finder):
    """Looks by a simulated task, which all who ask at a time share."""

    def __init__(self, router: SimRouter, sessions: Sessions, shelf: Shelf, peers: Any) -> None:
        super().__init__(router.name, sessions, shelf, peers)
        self._router = router
        self._tasks: dict[str, Task] = {}

    async def _here(self, tenant: str, response_id: str) -> Here | Owned | None:
        for _ in range(3):
            if running := self._sessions.find(tenant, response_id):
                return running if running.record.request.store else None
            task = self._tasks.get(response_id)
            if task is None:
                task = self._tasks[response_id] = self._router.process.spawn(
                    self._look(tenant, response_id), lambda _: self._tasks.pop(response_id, None)
                )
                if task.done:
                    self._tasks.pop(response_id, None)
            found = await task
            if not (isinstance(found, Running) and found.over.is_set()):
                return found  # type: ignore[no-any-return]
        raise ResponseMoved


class Names:
    """Which routers can be asked: all that are registered, alive or not."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def knows(self, router: str) -> bool:
        return router in self._names


class SimRouter:
    """One router, life after life. database: outlives it. peers: all routers by name, itself included."""

    def __init__(
        self,
        world: World,
        oracle: Oracle,
        name: str,
        database: FakeDatabase,
        metrics: Metrics,
        store_delay: float,
    ) -> None:
        self.world = world
        self.oracle = oracle
        self.name = name
        self.process = Process(world, name)
        self.database = database
        self.store_delay = store_delay
        self.wires: dict[str, Wire] = {}
        self.nodes: dict[str, Node] = {}
        self.peers: dict[str, SimRouter] = {}
        self.connections: list[Reader] = []
        self.on_gone: list[Any] = []
        self.serving = False
        self.able_since: list[tuple[float, int]] = []
        self._metrics = metrics
        self._made = 0
        self._mono_s = 0.0
        self._build()

    def _build(self) -> None:
        # A monotonic clock begins anywhere: nothing that one router measured means anything to another.
        self._mono_s = self.world.between(0.0, 1000.0) - self.world.now
        self.fleet = Fleet()
        self.store = SlowStore(self, self.database, f"{self.name}-{self.process.life}")
        shelf = Shelf(self.store)
        self.keeper = SimKeeper(self, self.store, self._metrics.store_failures.inc)
        self.sessions = Sessions(
            self,
            self.fleet,
            self.keeper.journal,
            self._metrics,
            self.instant,
            orphan_grace_s=ORPHAN_GRACE_S,
            failover_wait_s=FAILOVER_WAIT_S,
            salt_of=str,
        )
        self.finder = SimFinder(self, self.sessions, shelf, Names(list(self.peers)))
        self.shelf = shelf
        self.draining = False
        self.able_since = [(self.world.now, 0)]

    def instant(self) -> Instant:
        return Instant(self.world.now + self._mono_s, EPOCH_S + int(self.world.now))

    @property
    def idle(self) -> bool:
        return not (len(self.sessions) or len(self.keeper.journal))

    @property
    def reachable(self) -> bool:
        """Whether whoever connects is answered."""
        return self.process.works and self.serving

    # -- the process ---------------------------------------------------------------------------

    def boot(self) -> None:
        if self.process.alive:
            return
        self.process.begin_life()
        self.world.trace(self.name, "starts")
        self._build()
        self.process.spawn(self._begin())

    async def _begin(self) -> None:
        await self.keeper.look_once(self._held, self.sessions.adopt)
        self.serving = True
        for wire in self.wires.values():
            wire.try_soon()
        self.process.every(STATUS_PERIOD_S, self._tick)
        self.process.every(LINK_BEAT_S, self._beat_links)
        self.process.spawn(self._keep())

    def _held(self, response_id: str) -> bool:
        """Whether the keeper leaves it alone; its task is ended before a router that stops lets go of anything."""
        return self.draining or response_id in self.sessions

    async def _keep(self) -> None:
        while True:
            await Sleep(HEARTBEAT_S)
            if self.draining:
                return
            await self.keeper.look_once(self._held, self.sessions.adopt)

    def _tick(self) -> None:
        self.sessions.on_tick()
        self._note_able()

    def _beat_links(self) -> None:
        for wire in self.wires.values():
            if wire.current is not None:
                wire.current.beat()

    def freeze(self) -> None:
        self.process.freeze()
        self.able_since.append((self.world.now, 0))

    def kill(self) -> None:
        """Without warning: all of its memory is gone."""
        if not self.process.alive:
            return
        self.world.note("router kills")
        self.world.trace(self.name, f"is killed with {len(self.sessions)} responses")
        self._vanish()

    def shut_down(self) -> None:
        """In order: clients are told, the journal is written, the lease given back."""
        if not self.reachable or self.draining:
            return
        self.world.note("orderly stops")
        self.world.trace(self.name, f"stops with {len(self.sessions)} responses")
        self.draining = True
        self.sessions.suspend()
        self.process.spawn(self._leave(self.world.now + CLOSING_S))

    async def _leave(self, latest_s: float) -> None:
        while len(self.keeper.journal) and self.world.now < latest_s:
            await Sleep(0.01)
        try:
            await self.store.release()
        except StoreUnavailable:
            self.world.note("leases not given back")
        self.process.later(0.0, self._vanish)

    def _vanish(self) -> None:
        self.process.end_life()
        self.serving = False
        for wire in self.wires.values():
            for connection in wire.connections:
                connection.forget_router()
            wire.current = None
        gone, self.on_gone = self.on_gone, []
        for tell in gone:
            tell()

    # -- the links -----------------------------------------------------------------------------

    def send(self, node: str, frame: Generate | Cancel) -> bool:
        if self.world.tracing:
            self._trace_frame(node, frame)
        if isinstance(frame, Generate):
            self.oracle.dispatched(frame.stream, len(frame.output_ids))
        return self.wires[node].send(frame)

    def on_link_event(self, event: LinkEvent) -> None:
        if self.world.tracing:
            self._trace_event(event)
        self.sessions.on_link_event(event)

    def _trace_frame(self, node: str, frame: Generate | Cancel) -> None:
        what = f"after {len(frame.output_ids)} ids" if isinstance(frame, Generate) else ""
        self.world.trace(self.name, f"{type(frame).__name__} {frame.stream} e{frame.epoch} -> {node} {what}")

    def _trace_event(self, event: LinkEvent) -> None:
        frame = getattr(event, "frame", None)
        if type(frame).__name__ not in {"Status", "NoneType", "Progress"}:
            self.world.trace(self.name, f"{event.node} says {frame!r:.140}")

    # -- what clients ask ----------------------------------------------------------------------

    def create(self, record: RequestRecord, reader: Reader) -> Running:
        """As `dispatch.Dispatcher.begin`; raises NoNodeAvailable, Draining."""
        if self.draining:
            raise Draining
        items = record.request.input
        keys = prefix_keys(items, record.release, record.tenant)
        choice = choose(self.fleet.ready(self.instant().mono_s), record.request.model, prefix_keys=lambda _: keys)
        if choice is None:
            raise NoNodeAvailable(record.request.model)
        return self.sessions.start(record, items, choice, reader, self.instant().mono_s, keys)

    def new_id(self) -> str:
        """Unique over all of its lives."""
        self._made += 1
        return f"resp_{self.name}_{self._made:04d}"

    async def open(self, response_id: str, *, asked_by_router: bool = False) -> tuple[SimRouter, Here]:
        """Where a response is, and on whose table; raises what a client is told. Who stops takes no questions."""
        if self.draining:
            raise Draining
        if asked_by_router:
            return self, await self.finder.find_here(TENANT, response_id)
        found = await self.finder.find(TENANT, response_id)
        if not isinstance(found, Elsewhere):
            return self, found
        other = self.peers[found.router]
        if not other.reachable:
            raise RouterUnreachable(found.router)
        self.world.note("forwards")
        task = other.process.spawn(other.open(response_id, asked_by_router=True), lambda _: None)
        deadline_s = self.world.now + 2.0
        while not task.done:
            if self.world.now > deadline_s or not other.process.alive:
                raise RouterUnreachable(found.router)
            await Sleep(0.005)
        opened: tuple[SimRouter, Here] = await task
        if isinstance(opened[1], Running) and opened[1].over.is_set():
            # It ended while the answer was on its way; over HTTP its events would have come in that very answer.
            raise ResponseMoved
        return opened

    # -- for the oracle ------------------------------------------------------------------------

    def _note_able(self) -> None:
        """How large a conversation the nodes could have taken just now, whenever that changes."""
        ready = self.fleet.ready(self.instant().mono_s)
        most = max((node.hello.context_tokens for node in ready), default=0)
        if most != self.able_since[-1][1]:
            self.able_since.append((self.world.now, most))

    def able_for_s(self, context_tokens: int, since_s: float, until_s: float) -> float:
        """The longest that a node of that size was there without a break within that time."""
        longest = 0.0
        begins_s: float | None = None
        for (from_s, most), (to_s, _) in pairwise([*self.able_since, (self.world.now, 0)]):
            if most >= max(1, context_tokens) and to_s > since_s and from_s < until_s:
                begins_s = max(from_s, since_s) if begins_s is None else begins_s
                longest = max(longest, min(to_s, until_s) - begins_s)
            else:
                begins_s = None
        return longest
