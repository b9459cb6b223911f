"""Clients: they ask, read with a delay, lose their connection, come back elsewhere, cancel, delete, or never return.

What a client has got is what had arrived when its connection broke; the rest of what was sent to it is lost, and it
comes back for what follows the last event that it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import EdgechatError, ResponseNotFound
from core.stream import Event, Failure, Request, RequestRecord, replay
from router.errors import ResponseMoved
from router.finder import Here
from router.fleet import Node
from router.journal import StoredResponse
from router.sessions import Running, beyond
from tests.sim.oracle import Facts, Oracle, ReaderLog, Violation
from tests.sim.router import TENANT, SimRouter
from tests.sim.world import Sleep, Task, World

WAY_S = 0.01
PATIENCE_S = 3.0
MOST_TRIES = 4


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client behaves. vanishings: how often it loses its connection. returns: whether it comes back.

    delay_s: from sending to reading. cancels_s, deletes_s, second_s: when it cancels or deletes, and when somebody else
    begins to read the same response; after its beginning, 0 = never. loyal: comes back to the same router.
    watches_s: how often it looks whether its router still lives.
    """

    delay_s: float = 0.03
    vanishings: int = 0
    away_s: float = 1.0
    stays_s: float = 1.0
    returns: bool = True
    loyal: bool = False
    cancels_s: float = 0.0
    deletes_s: float = 0.0
    second_s: float = 0.0
    watches_s: float = 1.5


class Connection:
    """A reader on a router's table; what it is told arrives at the client later, or never."""

    def __init__(self, reading: Reading, router: SimRouter) -> None:
        self.reading = reading
        self.routers = [router]
        self.table = router
        self.running: Running | None = None
        self.broken = False
        self._life = router.process.life
        self._sent: list[tuple[float, list[Event]]] = []

    # -- the router's side ---------------------------------------------------------------------

    def on_events(self, events: list[Event]) -> None:
        reading = self.reading
        reading.world.note("deliveries")
        reading.oracle.delivered(self.table, reading.facts, events)
        self._sent.append((reading.world.now, list(events)))
        if not reading.knows_id:
            reading.world.after(reading.manner.delay_s, reading.hear_of_id, self)

    def on_serving(self, node: Node) -> None:
        """For people to look at."""

    def on_reading(self, computed: int, total: int) -> None:
        """For people to look at."""

    def on_end(self, response: StoredResponse) -> None:
        self._detach()
        reading = self.reading
        if not reading.facts.stored:
            reading.oracle.ended_unstored(self.table, reading.facts, response)
        reading.world.after(reading.manner.delay_s, reading.finish, self)

    def on_refused(self, failure: Failure) -> None:
        self._detach()
        reading = self.reading
        if not failure.retryable and self._sent:
            raise Violation(f"{reading.facts.record.id} stopped for good without an end: {failure}")
        reading.world.after(reading.manner.delay_s, reading.refused, self, failure)

    def attach(self, router: SimRouter, running: Running) -> None:
        self.table, self.running, self._life = router, running, router.process.life
        self.reading.oracle.joined(router, self.reading.facts)

    def _detach(self) -> None:
        if self.running is not None:
            self.running = None
            self.reading.oracle.left(self.table, self.reading.facts)

    # -- the client's side ---------------------------------------------------------------------

    def take(self, sent_before_s: float) -> list[Event]:
        """What had arrived of what was sent."""
        return [event for at_s, events in self._sent if at_s <= sent_before_s for event in events]

    def leave(self, after_s: float) -> None:
        """The client is gone; the router notices after a while."""
        table, life = self.table, self._life
        if self.running is not None and table.process.life == life:
            table.process.hear(after_s, self._left)

    def _left(self) -> None:
        if self.running is not None:
            running = self.running
            self._detach()
            self.table.sessions.leave(running, self)


class Reading:
    """One reader of one response, from its first connection to the last."""

    def __init__(self, client: Client, name: str, facts: Facts, manner: Manner) -> None:
        self.client = client
        self.world: World = client.world
        self.oracle: Oracle = client.oracle
        self.facts = facts
        self.manner = manner
        self.log = ReaderLog(name)
        self.over = False
        self.knows_id = False
        self._connection: Connection | None = None
        self._vanishings = manner.vanishings
        self._attempt = 0
        facts.logs.append(self.log)

    def begin(self, router: SimRouter) -> Connection:
        """A connection to this router, watched."""
        connection = self._connection = Connection(self, router)
        router.on_gone.append(lambda: self.world.after(0.05, self._lost, connection))
        self.world.after(self.manner.watches_s, self._watch, connection)
        if self._vanishings:
            stays_s = self.manner.stays_s * self.world.between(0.2, 1.5)
            self.world.after(stays_s, self._vanish, connection)
        return connection

    # -- what happens to it --------------------------------------------------------------------

    def hear_of_id(self, connection: Connection) -> None:
        if connection is self._connection and not self.knows_id:
            self.knows_id = True
            self.client.knows(self.facts)

    def finish(self, connection: Connection) -> None:
        if connection is self._connection:
            self._take(connection, self.world.now)
            if not self.log.ended:
                raise Violation(f"{self.log.name} was told that {self.facts.record.id} ended, without its last event")
            self._stop()

    def refused(self, connection: Connection, failure: Failure) -> None:
        if connection is not self._connection:
            return
        self.world.note(f"told: {failure.code}")
        self._take(connection, self.world.now)
        self._come_back_or_not(0.3)

    def _lost(self, connection: Connection) -> None:
        """Its router is gone."""
        if connection is self._connection:
            self._take(connection, self.world.now - self.manner.delay_s)
            self._come_back_or_not(0.2)

    def _watch(self, connection: Connection) -> None:
        """Nobody waits for ever for a router that says nothing."""
        if connection is not self._connection or self.over:
            return
        if all(router.process.works for router in connection.routers):
            self.world.after(self.manner.watches_s, self._watch, connection)
            return
        self._break(connection)

    def _vanish(self, connection: Connection) -> None:
        if connection is not self._connection or self.over:
            return
        self._vanishings -= 1
        self.world.note("vanished clients")
        self._break(connection)

    def _break(self, connection: Connection) -> None:
        connection.leave(self.world.between(0.0, 1.0))
        self._take(connection, self.world.now - self.manner.delay_s)
        self._come_back_or_not(self.manner.away_s)

    def _take(self, connection: Connection, sent_before_s: float) -> None:
        self._connection = None
        heard = connection.take(sent_before_s)
        self.log.hear(heard)
        if heard and not self.knows_id:
            self.knows_id = True
            self.client.knows(self.facts)

    def _come_back_or_not(self, after_s: float) -> None:
        if self.log.ended:
            self._stop()
        elif not self.knows_id:
            # It never heard the id: for this client there is no such response.
            self.log.left = True
            self._stop()
            self.client.ask_again()
        elif not self.manner.returns or not self.facts.stored:
            self.log.left = True
            if not self.facts.stored and self.manner.returns:
                self.client.look_for_unstored(self.facts)
            self._stop()
        else:
            self.world.after(after_s * self.world.between(0.5, 1.5), self.resume)

    def _stop(self) -> None:
        self.over = True
        self._connection = None

    # -- coming back ---------------------------------------------------------------------------

    def resume(self) -> None:
        """Ask some router for what follows the last event that it has."""
        if self.over or self._connection is not None:
            return
        router = self.client.pick(self.manner.loyal)
        if router is None:
            self.world.after(0.5, self.resume)
            return
        self._attempt += 1
        attempt = self._attempt
        self.world.after(PATIENCE_S, self._give_up, attempt)
        router.process.hear(WAY_S, self._ask, router, attempt)

    def _give_up(self, attempt: int) -> None:
        """No answer at all: the router died or froze with the question."""
        if attempt == self._attempt and self._connection is None and not self.over:
            self.resume()

    def _ask(self, router: SimRouter, attempt: int) -> None:
        if attempt == self._attempt and router.serving:
            router.process.spawn(self._follow(router, attempt), lambda task: self._answered(task, attempt))

    async def _follow(self, router: SimRouter, attempt: int) -> None:
        after = len(self.log.events) - 1
        table, here = await router.open(self.facts.record.id)
        if attempt != self._attempt or self._connection is not None or self.over:
            return
        connection = self.begin(router)
        if table is not router:
            connection.routers.append(table)
            table.on_gone.append(lambda: self.world.after(0.05, self._lost, connection))
        try:
            if isinstance(here, Running):
                self._join(connection, table, here, after)
            else:
                self._reread(connection, here, after)
        except EdgechatError:
            self._connection = None
            raise
        self._attempt += 1  # it is answered: nobody gives up waiting for it
        self.world.note("resumed readers")

    def _join(self, connection: Connection, table: SimRouter, running: Running, after: int) -> None:
        connection.table = table
        try:
            table.sessions.join(running, connection, after)
        except EdgechatError:
            self.oracle.beyond(table, self.facts, after)
            raise
        connection.attach(table, running)

    def _reread(self, connection: Connection, stored: StoredResponse, after: int) -> None:
        events = replay(stored.record, stored.deltas, stored.end)
        if after >= len(events):
            raise beyond(after, len(events) - 1)
        self.world.note("readers after the end")
        if events[after + 1 :]:
            connection.on_events(events[after + 1 :])
        connection.on_end(stored)

    def _answered(self, task: Task, attempt: int) -> None:
        error = task.error
        if error is None or attempt != self._attempt:
            return
        if not isinstance(error, EdgechatError):
            raise error
        self.world.trace(self.log.name, f"is told {error.code} of {self.facts.record.id}")
        self.world.note(f"told: {error.code}")
        if isinstance(error, ResponseNotFound):
            self.oracle.not_found(self.facts)
            self.log.gone = True
            self._stop()
        else:
            self.world.after(self.world.between(0.3, 1.2), self.resume)


class Stopper:
    """The reader that a cancellation or a deletion waits with."""

    def __init__(self) -> None:
        self.over = False
        self.refused = False

    def on_events(self, events: list[Event]) -> None:
        """It only wants the end."""

    def on_serving(self, node: Node) -> None:
        """It only wants the end."""

    def on_reading(self, computed: int, total: int) -> None:
        """It only wants the end."""

    def on_end(self, response: StoredResponse) -> None:
        self.over = True

    def on_refused(self, failure: Failure) -> None:
        self.over = self.refused = True


class Client:
    """One person with one question."""

    def __init__(self, world: World, oracle: Oracle, routers: list[SimRouter], number: int, request: Request) -> None:
        self.world = world
        self.oracle = oracle
        self.name = f"client{number}"
        self.routers = routers
        self.request = request
        self.manner = Manner()
        self.readings: list[Reading] = []
        self.over = False
        self._seed = number
        self._tries = 0
        self._busy = 0
        self._home: SimRouter | None = None

    @property
    def settled(self) -> bool:
        return self.over and not self._busy and all(reading.over for reading in self.readings)

    def pick(self, loyal: bool) -> SimRouter | None:
        """A router that answers; None: there is none at the moment."""
        reachable = [router for router in self.routers if router.reachable and not router.draining]
        if loyal and self._home is not None:
            return self._home if self._home in reachable else None
        return self.world.chance.choice(reachable) if reachable else None

    # -- asking --------------------------------------------------------------------------------

    def ask(self) -> None:
        router = self.pick(loyal=False)
        if router is None:
            self.world.after(0.5, self.ask)
            return
        router.process.hear(WAY_S, self._create, router)
        self.world.after(PATIENCE_S, self._nobody_answered, self._tries)

    def _nobody_answered(self, tries: int) -> None:
        if tries == self._tries and not self.over:
            self._tries += 1
            self.ask()

    def ask_again(self) -> None:
        """The request was refused, or its router died before it said anything."""
        self.world.note("asked again")
        if self._tries >= MOST_TRIES:
            self.over = True
            return
        self.over = False
        self.world.after(self.world.between(0.3, 1.5), self.ask)

    def _create(self, router: SimRouter) -> None:
        if self.over or not router.serving:
            return
        self._tries += 1
        self._seed += 1000
        record = RequestRecord(
            id=router.new_id(),
            tenant=TENANT,
            created_at=router.instant().unix_s,
            seed=self._seed,
            release="tiny@0123456789ab",
            request=self.request,
        )
        facts = self.oracle.created(record)
        self.world.trace(self.name, f"asks {router.name}: {record.id}")
        reading = Reading(self, self.name, facts, self.manner)
        connection = reading.begin(router)
        try:
            self._home = router
            connection.running = router.create(record, connection)
        except EdgechatError as error:
            self.world.note(f"not begun: {error.code}")
            reading.over = True
            reading.log.left = True
            reading.refused(connection, Failure(error.code, error.message, error.retryable))
            return
        if record.id in router.sessions:
            connection.attach(router, connection.running)
        else:
            connection.running = None
        self.readings.append(reading)
        self.over = True

    # -- more about it -------------------------------------------------------------------------

    def knows(self, facts: Facts) -> None:
        """The id is known: it can be cancelled, deleted, and read by others."""
        manner = self.manner
        if manner.cancels_s:
            self._busy += 1
            self.world.after(manner.cancels_s, self._change, facts, False)
        if manner.deletes_s and facts.stored:
            self._busy += 1
            self.world.after(manner.deletes_s, self._change, facts, True)
        if manner.second_s and facts.stored:
            self.manner = Manner(delay_s=manner.delay_s)
            second = Reading(self, self.name + "b", facts, Manner(delay_s=0.2))
            second.knows_id = True
            self.readings.append(second)
            self.world.after(manner.second_s, second.resume)

    def look_for_unstored(self, facts: Facts) -> None:
        """Nobody finds again what was not to be stored."""
        router = self.pick(loyal=True)
        if router is None:
            return

        def answered(task: Task) -> None:
            if task.error is None:
                raise Violation(f"{facts.record.id} is not stored and was found: {task.result}")
            if isinstance(task.error, ResponseNotFound):
                self.world.note("unstored not found")

        router.process.hear(1.5, lambda: router.process.spawn(router.open(facts.record.id), answered))

    def _change(self, facts: Facts, delete: bool) -> None:
        """Cancel or delete, again and again until somebody has done it."""
        router = self.pick(loyal=False)
        if router is None or (not facts.stored and self._home is not router):
            router = self._home
        if router is None or not router.reachable:
            self.world.after(0.5, self._change, facts, delete)
            return
        state = {"done": False}

        def answered(task: Task) -> None:
            if state["done"]:
                return
            state["done"] = True
            if task.error is None or isinstance(task.error, ResponseNotFound):
                self._busy -= 1
                if delete:
                    self.oracle.deleted(facts)
            elif isinstance(task.error, EdgechatError):
                self.world.after(0.7, self._change, facts, delete)
            else:
                raise task.error

        def unanswered() -> None:
            if not state["done"]:
                state["done"] = True
                self.world.after(0.1, self._change, facts, delete)

        self.world.after(PATIENCE_S, unanswered)
        router.process.hear(WAY_S, lambda: router.process.spawn(self._stopped(router, facts, delete), answered))

    async def _stopped(self, router: SimRouter, facts: Facts, delete: bool) -> None:
        facts.delete_asked |= delete
        facts.cancel_asked |= not delete
        table: SimRouter = router
        here: Here | None
        if facts.stored:
            table, here = await router.open(facts.record.id)
        else:
            here = router.sessions.find(TENANT, facts.record.id)
        if isinstance(here, Running):
            self.world.note("deleted while running" if delete else "cancelled while running")
            stopper = Stopper()
            table.sessions.join(here, stopper)
            table.sessions.cancel(here, keep=not delete)
            while not stopper.over and table.process.alive:
                await Sleep(0.01)
            if stopper.refused or not stopper.over:
                raise ResponseMoved
        if delete:
            await table.shelf.delete(TENANT, facts.record.id)
