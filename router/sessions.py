"""The table of running responses: feeds each session its events and carries out the effects.

Knows the links, the fleet and the store. Does not know what clients speak: a `Reader` is told events.
Everything runs on the event loop's thread; only writing to the store is awaited.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from core.conversation import Item
from core.errors import StoreUnavailable
from core.frames import Cancel, Done, Drain, Failed, Generate, Progress, Row, Started, Status, Tokens
from core.stream import EndRecord, Event, Failure, RequestRecord, StreamLog, replay
from router.fleet import Fleet, Node
from router.journal import StoredResponse
from router.link import LinkDown, LinkEvent, LinkFrame, LinkRtt, LinkUp
from router.metrics import Metrics
from router.policy import Choice, choose
from router.session import (
    Deliver,
    Effect,
    Finished,
    Instant,
    NeedNode,
    NodeFrame,
    Reading,
    Refused,
    SendNode,
    Serving,
    Session,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


class Links(Protocol):
    """What of `link.LinkPool` a session needs."""

    def send(self, node: str, frame: Generate | Cancel) -> bool: ...


class AnyStore(Protocol):
    """What of `store.ResponseStore` is used."""

    async def put(self, stored: StoredResponse) -> None: ...
    async def get(self, tenant: str, response_id: str) -> StoredResponse | None: ...
    async def delete(self, tenant: str, response_id: str) -> bool: ...


class Shelf:
    """The store as the rest of the router sees it.

    Its own errors name a file on our disk: they are logged for the operator, and every method raises
    StoreUnavailable with a sentence fit for clients.
    """

    def __init__(self, store: AnyStore) -> None:
        self._store = store

    async def put(self, stored: StoredResponse) -> None:
        await self._careful(self._store.put(stored))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        return await self._careful(self._store.get(tenant, response_id))

    async def delete(self, tenant: str, response_id: str) -> bool:
        return await self._careful(self._store.delete(tenant, response_id))

    async def _careful(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except StoreUnavailable as error:
            log.error("%s", error.message)
            sentence = "The router's store cannot be used at the moment; send the request again."
            raise StoreUnavailable(sentence, retry_after_s=error.retry_after_s or 2.0) from error


class Reader(Protocol):
    """Somebody who follows a response. All calls are synchronous and must not block.

    The last is `on_end`, or `on_refused` if nothing was promised: then it is also the first.
    """

    def on_events(self, events: list[Event]) -> None: ...
    def on_serving(self, node: Node) -> None: ...
    def on_reading(self, computed: int, total: int) -> None: ...
    def on_end(self, response: StoredResponse) -> None: ...
    def on_refused(self, failure: Failure) -> None: ...


@dataclass(eq=False, slots=True)
class Running:
    """One response in the table. keep: whether it goes to the store. over: set when nothing follows.

    delivered: how many events readers were given, which is the number of the next.
    """

    session: Session
    readers: list[Reader]
    started_at_s: float
    keep: bool
    delivered: int = 0
    first_id_seen: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def record(self) -> RequestRecord:
        return self.session.record


class Sessions:
    """Invariant: a response is in the table from its dispatch until its readers know its end and, if it
    asked for that, the store has it; so a client that saw the end can always continue from it."""

    def __init__(
        self,
        links: Links,
        fleet: Fleet,
        store: Shelf,
        metrics: Metrics,
        now: Callable[[], Instant],
        *,
        orphan_grace_s: float,
    ) -> None:
        self._links = links
        self._fleet = fleet
        self._store = store
        self._metrics = metrics
        self._now = now
        self._orphan_grace_s = orphan_grace_s
        self._table: dict[str, Running] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._suspects: set[str] = set()

    def __len__(self) -> int:
        return len(self._table)

    # -- what clients do -----------------------------------------------------------------------

    def start(
        self,
        record: RequestRecord,
        items: list[Item],
        node: str,
        reader: Reader,
        arrived_at_s: float,
        salt: str,
        prefix_keys: Sequence[str] = (),
    ) -> Running:
        """Dispatch to a node that was chosen just now; the reader hears of it when the node has answered."""
        session = Session(
            record,
            items,
            cache_salt=salt,
            orphan_grace_s=self._orphan_grace_s,
            prefix_keys=prefix_keys,
            name_of=self._name_of,
        )
        running = self._admit(session, reader)
        self._carry_out(running, session.start(node, self._now(), arrived_at_s))
        return running

    def warm_up(self, record: RequestRecord, reader: Reader) -> Running:
        """Answer with nothing, without a node: the id can be continued from."""
        session = Session(record, [], cache_salt="", orphan_grace_s=0.0)
        running = self._admit(session, reader)
        self._carry_out(running, session.warm_up(self._now()))
        return running

    def find(self, tenant: str, response_id: str) -> Running | None:
        """A running response of this tenant; another tenant's is as unknown as none."""
        running = self._table.get(response_id)
        return running if running is not None and running.record.tenant == tenant else None

    def cancel(self, running: Running, *, keep: bool = True) -> None:
        """The client wants no more of it; keep=False: nor that it be stored."""
        running.keep = running.keep and keep
        self._carry_out(running, running.session.on_cancel(self._now()))

    def leave(self, running: Running, reader: Reader) -> None:
        """A reader went away; calling it after the end, or twice, changes nothing."""
        if reader in running.readers:
            running.readers.remove(reader)
            self._carry_out(running, running.session.on_reader_left(self._now()))

    async def close(self) -> None:
        """End what still runs as cancelled and wait until the store has it."""
        for running in list(self._table.values()):
            self.cancel(running)
        while self._writes:
            await asyncio.wait(self._writes)

    def _name_of(self, url: str) -> str:
        node = self._fleet.nodes.get(url)
        return node.hello.name if node else "unknown"

    def _admit(self, session: Session, reader: Reader) -> Running:
        running = Running(session, [reader], self._now().mono_s, session.record.request.store)
        self._table[session.record.id] = running
        return running

    # -- what nodes do -------------------------------------------------------------------------

    def on_link_event(self, event: LinkEvent) -> None:
        """Called by the links, in order for each node."""
        now_s = self._now().mono_s
        match event:
            case LinkUp(node, hello):
                self._fleet.on_up(node, hello, now_s)
                log.info("node %s (%s) is up at %s", hello.name, hello.region, node)
            case LinkDown(node, reason):
                log.warning("node at %s is down: %s", node, reason)
                self._fleet.on_down(node, now_s)
                self._move_from({node}, stop=False)
            case LinkRtt(node, rtt_s):
                self._fleet.on_rtt(node, rtt_s)
            case LinkFrame(node, frame):
                self._on_frame(node, frame, now_s)

    def on_tick(self) -> None:
        """Every 250 ms: move streams away from nodes that cannot be trusted, end orphans."""
        now = self._now()
        self._fleet.forget_long_gone(now.mono_s)
        suspects = self._look_for_suspects(now.mono_s)
        self._move_from(self._fleet.untrusted(now.mono_s) - suspects, stop=True)
        self._move_if_possible(suspects, now)
        for running in list(self._table.values()):
            self._carry_out(running, running.session.on_time(now))

    def _on_frame(
        self, node: str, frame: Tokens | Started | Progress | Done | Failed | Status | Drain, now_s: float
    ) -> None:
        match frame:
            case Tokens(rows):
                for row in rows:
                    self._on_stream_frame(node, row)
            case Status():
                self._fleet.on_status(node, frame, now_s)
            case Drain():
                self._fleet.on_drain(node)
            case _:
                self._on_stream_frame(node, frame)

    def _on_stream_frame(self, node: str, frame: NodeFrame) -> None:
        running = self._table.get(frame.stream)
        if running is None:
            self._metrics.dropped_frames.inc()
            return
        if isinstance(frame, Row) and not running.first_id_seen:
            running.first_id_seen = True
            self._metrics.first_token_s.observe(self._now().mono_s - running.started_at_s)
        self._carry_out(running, running.session.on_frame(node, frame, self._now()))

    def _move_from(self, nodes: Collection[str], *, stop: bool) -> None:
        """Continue the streams of `nodes` elsewhere. stop: the link is up, so tell the node to forget them."""
        if not nodes:
            return
        for running in list(self._table.values()):
            session, node = running.session, running.session.node
            if node is None or node not in nodes:
                continue
            if stop:
                self._links.send(node, Cancel(session.record.id, session.epoch))
            self._metrics.moved_streams.inc()
            self._carry_out(running, session.on_node_lost(node, self._now()))
            self._log_move(session, node)

    def _look_for_suspects(self, now_s: float) -> set[str]:
        """The nodes that fell silent, or whose engine did, while their links are up."""
        states = {url: node.state(now_s) for url, node in self._fleet.nodes.items()}
        suspects = {url for url, state in states.items() if state == "suspect"}
        for url in sorted(suspects - self._suspects):
            log.warning("node %s has not vouched for itself in time: it is given nothing new", self._name_of(url))
        for url in sorted(self._suspects - suspects):
            if states.get(url, "down") != "down":
                log.info("node %s is trusted again", self._name_of(url))
        self._suspects = suspects
        return suspects

    def _move_if_possible(self, suspects: Collection[str], now: Instant) -> None:
        """A suspect's streams go elsewhere if somebody can take them; else it may still go on with them."""
        for running in list(self._table.values()):
            session, node = running.session, running.session.node
            if node is None or node not in suspects:
                continue
            effects = session.on_suspicion(lambda needed: self._choose(needed) is not None, now)
            if not effects:
                continue
            self._carry_out(running, effects)
            if session.node is not None:
                self._metrics.moved_streams.inc()
                self._log_move(session, node)

    def _log_move(self, session: Session, node: str) -> None:
        if session.node is None:
            log.warning("stream %s was lost with node %s", session.record.id, self._name_of(node))
        else:
            names = self._name_of(node), self._name_of(session.node)
            log.info("stream %s moves from node %s to %s after %d ids", session.record.id, *names, len(session.ids))

    # -- effects -------------------------------------------------------------------------------

    def _carry_out(self, running: Running, effects: Iterable[Effect]) -> None:
        todo = deque(effects)
        session = running.session
        while todo:
            match todo.popleft():
                case SendNode(node, frame):
                    todo.extend(self._send(session, node, frame))
                case NeedNode() as needed:
                    choice = self._choose(needed, session.prefix_keys)
                    todo.extend(session.assign(choice.node.url if choice else None, self._now()))
                case Deliver(events) if todo and isinstance(finished := todo[0], Finished):
                    todo.popleft()
                    self._finish(running, events, finished)
                case Deliver(events):
                    self._deliver(running, events)
                case Serving(url):
                    # Not any more, if sending to it has just failed.
                    if url == session.node and (chosen := self._fleet.nodes.get(url)):
                        for reader in list(running.readers):
                            reader.on_serving(chosen)
                case Reading(computed, total):
                    for reader in list(running.readers):
                        reader.on_reading(computed, total)
                case Finished() as alone:
                    self._finish(running, [], alone)
                case Refused(failure):
                    self._refuse(running, failure)

    def _choose(self, needed: NeedNode, prefix_keys: Sequence[str] = ()) -> Choice | None:
        ready = self._fleet.ready(self._now().mono_s)
        return choose(ready, needed.release, needed.exclude, lambda _: prefix_keys)

    def _send(self, session: Session, node: str, frame: Generate | Cancel) -> list[Effect]:
        sent = self._links.send(node, frame)
        if isinstance(frame, Cancel):
            return []
        if not sent:
            return session.on_node_lost(node, self._now())
        self._fleet.on_dispatch(node)
        return []

    def _deliver(self, running: Running, events: list[Event]) -> None:
        running.delivered += len(events)
        for reader in list(running.readers):
            reader.on_events(events)

    def _refuse(self, running: Running, failure: Failure) -> None:
        self._table.pop(running.record.id, None)
        for reader in list(running.readers):
            reader.on_refused(failure)
        running.over.set()

    def _finish(self, running: Running, last: list[Event], finished: Finished) -> None:
        response = StoredResponse(finished.record, finished.ids, finished.deltas, finished.end)
        if not running.keep:
            self._close(running, last, response)
            return
        write = asyncio.create_task(self._keep(running, last, response), name=f"store {finished.record.id}")
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    async def _keep(self, running: Running, last: list[Event], response: StoredResponse) -> None:
        """Store first, then tell: whoever saw the end can continue from it."""
        try:
            await self._store.put(response)
        except Exception:
            # Whatever keeps the store from writing, the client must hear of it and not wait for ever.
            log.exception("cannot store the response %s", response.record.id)
            response = _unstored(response)
            last = replay(response.record, response.deltas, response.end)[running.delivered :]
        self._close(running, last, response)

    def _close(self, running: Running, last: list[Event], response: StoredResponse) -> None:
        self._table.pop(response.record.id, None)
        self._metrics.on_end(response.end.status, len(response.ids), running.session.dropped_frames)
        self._deliver(running, last)
        for reader in list(running.readers):
            reader.on_end(response)
        running.over.set()


def _unstored(response: StoredResponse) -> StoredResponse:
    """The same response, ended by the store's failure: its log is the one delivered, up to the end."""
    error = StoreUnavailable("The answer could not be kept, which you had asked for; send the request again.")
    failure = Failure(error.code, error.message, error.retryable)
    end = EndRecord(status="failed", completed_at=response.end.completed_at, error=failure, usage=response.end.usage)
    return StoredResponse(response.record, response.ids, response.deltas, end)


def response_object(response: StoredResponse) -> dict[str, object]:
    """The response object of a finished response."""
    log_ = StreamLog(response.record)
    log_.extend(response.deltas)
    log_.close(response.end)
    return log_.response()
