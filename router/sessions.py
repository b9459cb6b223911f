"""The table of running responses: feeds each session its events and carries out the effects.

Knows the links, the fleet and the journal. Does not know what clients speak (a `Reader` is told events), nor the
store behind the journal. Nothing here waits: it is driven by calls, in real time or in a simulated one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.conversation import Item, prefix_keys
from core.errors import EdgechatError, RequestError
from core.frames import Cancel, Done, Drain, Failed, Generate, Progress, Row, Started, Status, Tokens
from core.stream import Event, Failure, RequestRecord, StreamLog
from router import terms
from router.effects import Deliver, Effect, Finished, NeedNode, Place, Reading, Refused, SendNode, Serving, Write
from router.errors import Draining
from router.fleet import Fleet, Node
from router.journal import Journal, Outcome, StoredResponse, Unfinished
from router.link import LinkDown, LinkEvent, LinkFrame, LinkRtt, LinkUp
from router.metrics import Metrics
from router.policy import Choice, choose
from router.session import Instant, NodeFrame, Session

log = logging.getLogger(__name__)
MISTAKE = "The router made a mistake; resume the response, or send the request again."


class Links(Protocol):
    """What of `link.LinkPool` a session needs."""

    def send(self, node: str, frame: Generate | Cancel) -> bool: ...


class Reader(Protocol):
    """Somebody who follows a response. All calls are synchronous and must not block.

    The last is `on_end`, or `on_refused` if no end follows here: nothing was promised, or it goes on without us.
    """

    def on_events(self, events: list[Event]) -> None: ...
    def on_serving(self, node: Node) -> None: ...
    def on_reading(self, computed: int, total: int) -> None: ...
    def on_end(self, response: StoredResponse) -> None: ...
    def on_refused(self, failure: Failure) -> None: ...


@dataclass(eq=False, slots=True)
class Running:
    """One response in the table. over: set when nothing follows."""

    session: Session
    readers: list[Reader]
    started_at_s: float
    first_id_seen: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def record(self) -> RequestRecord:
        return self.session.record


class Sessions:
    """Invariant: a response is in the table from its dispatch until its readers know its end and, if it
    asked for that, the store has it; so a client that saw the end can always continue from it.

    salt_of: what keys the nodes' prefix stores for a tenant.
    """

    def __init__(
        self,
        links: Links,
        fleet: Fleet,
        journal: Journal,
        metrics: Metrics,
        now: Callable[[], Instant],
        *,
        orphan_grace_s: float,
        failover_wait_s: float,
        salt_of: Callable[[str], str],
    ) -> None:
        self._links = links
        self._fleet = fleet
        self._journal = journal
        self._metrics = metrics
        self._now = now
        self._orphan_grace_s = orphan_grace_s
        self._failover_wait_s = failover_wait_s
        self._salt_of = salt_of
        self._table: dict[str, Running] = {}
        self.suspended = False
        self._seen_ready = False
        self._suspects: set[str] = set()
        self._lives: dict[str, tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._table

    # -- what clients do -----------------------------------------------------------------------

    def start(
        self,
        record: RequestRecord,
        items: list[Item],
        choice: Choice,
        reader: Reader,
        arrived_at_s: float,
        prefix_keys: Sequence[str] = (),
    ) -> Running:
        """Dispatch to a node that was chosen just now; the reader hears of it when the node has answered."""
        running = self._admit(self._session(record, items, prefix_keys), [reader])
        self._carry_out(running, running.session.start(_place(choice), self._now(), arrived_at_s))
        self._journal.flush()
        return running

    def warm_up(self, record: RequestRecord, reader: Reader) -> Running:
        """Answer with nothing, without a node: the id can be continued from."""
        running = self._admit(self._session(record, [], ()), [reader])
        self._carry_out(running, running.session.warm_up(self._now()))
        self._journal.flush()
        return running

    def adopt(self, unfinished: Unfinished) -> Running:
        """Go on with a response that was claimed from the store; nobody reads it yet. Raises Draining."""
        if self.suspended:
            raise Draining
        record, items = unfinished.record, unfinished.items
        keys = prefix_keys(items, record.release, self._salt_of(record.tenant))
        running = self._admit(self._session(record, items, keys), [])
        running.first_id_seen = bool(unfinished.ids)
        self._metrics.adopted.inc()
        log.info("stream %s is taken over after %d ids", record.id, len(unfinished.ids))
        self._carry_out(running, running.session.resume(unfinished, self._now()))
        self._journal.flush()
        return running

    def find(self, tenant: str, response_id: str) -> Running | None:
        """A running response of this tenant; another tenant's is as unknown as none."""
        running = self._table.get(response_id)
        return running if running is not None and running.record.tenant == tenant else None

    def join(self, running: Running, reader: Reader, starting_after: int = -1) -> None:
        """One more reader: it is told at once what was said after that event, then all that follows.

        Raises RequestError when nothing that far was said.
        """
        told = running.session.told()
        if not -1 <= starting_after < max(1, len(told)):
            raise beyond(starting_after, len(told) - 1)
        running.readers.append(reader)
        running.session.on_reader_joined()
        if running.session.node is not None and (node := self._fleet.nodes.get(running.session.node)):
            reader.on_serving(node)
        if missed := told[starting_after + 1 :]:
            reader.on_events(missed)

    def cancel(self, running: Running, *, keep: bool = True) -> None:
        """The client wants no more of it; keep=False: nor that anything of it be kept."""
        self._carry_out(running, running.session.on_cancel(self._now(), keep=keep))
        self._journal.flush()

    def leave(self, running: Running, reader: Reader) -> None:
        """A reader went away; calling it after the end, or twice, changes nothing."""
        if reader in running.readers:
            running.readers.remove(reader)
            self._carry_out(running, running.session.on_reader_left(self._now()))
            self._journal.flush()

    def suspend(self) -> None:
        """This router stops: nothing gets an end here. What is stored is left for whoever goes on with it.

        What this router still writes of it must not meet what it would write as its successor: it adopts nothing more.
        """
        self.suspended = True
        for running in list(self._table.values()):
            self._carry_out(running, running.session.suspend(Draining()))

    def _session(self, record: RequestRecord, items: list[Item], prefix_keys: Sequence[str]) -> Session:
        return Session(
            record,
            items,
            cache_salt=self._salt_of(record.tenant),
            orphan_grace_s=self._orphan_grace_s,
            failover_wait_s=self._failover_wait_s,
            prefix_keys=prefix_keys,
            name_of=self._name_of,
        )

    def _name_of(self, url: str) -> str:
        node = self._fleet.nodes.get(url)
        return node.hello.name if node else "unknown"

    def _admit(self, session: Session, readers: list[Reader]) -> Running:
        running = Running(session, readers, self._now().mono_s)
        self._table[session.record.id] = running
        return running

    # -- what nodes do -------------------------------------------------------------------------

    def on_link_event(self, event: LinkEvent) -> None:
        """Called by the links, in order for each node."""
        now_s = self._now().mono_s
        match event:
            case LinkUp(node, hello):
                self._fleet.on_up(node, hello, now_s)
                self._renew(node)
                log.info("node %s (%s) is up at %s", hello.name, hello.region, node)
            case LinkDown(node, reason):
                log.warning("node at %s is down: %s", node, reason)
                self._fleet.on_down(node, now_s)
                self._lives.pop(node, None)
                self._move_from({node}, stop=False)
            case LinkRtt(node, rtt_s):
                self._fleet.on_rtt(node, rtt_s)
            case LinkFrame(node, frame):
                self._on_frame(node, frame, now_s)
        self._journal.flush()

    def on_tick(self) -> None:
        """Every 250 ms: move streams away from nodes that cannot be trusted or want to stop, end orphans."""
        now = self._now()
        self._fleet.forget_long_gone(now.mono_s)
        suspects = self._look_for_suspects(now.mono_s)
        self._move_from(self._fleet.untrusted(now.mono_s) - suspects, stop=True)
        self._move_if_possible(suspects)
        self._hand_over(self._fleet.leaving(now.mono_s))
        for running in list(self._table.values()):
            self._carry_out(running, running.session.on_time(now))
        self._journal.flush()

    def _on_frame(
        self, node: str, frame: Tokens | Started | Progress | Done | Failed | Status | Drain, now_s: float
    ) -> None:
        match frame:
            case Tokens(rows):
                for row in rows:
                    self._on_stream_frame(node, row)
            case Status():
                self._on_status(node, frame, now_s)
            case Drain():
                self._fleet.on_drain(node)
                self._hand_over({node})
            case _:
                self._on_stream_frame(node, frame)

    def _on_status(self, node: str, status: Status, now_s: float) -> None:
        self._fleet.on_status(node, status, now_s)
        if not status.vouched:
            self._move_if_possible(self._look_for_suspects(now_s))
        known = self._fleet.nodes.get(node)
        if known is None or status.state != "ready" or self._lives.get(node) == known.life:
            return
        self._seen_ready = True
        # Another engine than the one we knew: there may be a place for those who wait for one.
        self._lives[node] = known.life
        self._renew(node)
        for running in list(self._table.values()):
            self._carry_out(running, running.session.on_chance())

    def _renew(self, node: str) -> None:
        for running in self._table.values():
            running.session.on_node_renewed(node)

    def _on_stream_frame(self, node: str, frame: NodeFrame) -> None:
        running = self._table.get(frame.stream)
        if running is None:
            self._metrics.dropped_frames.inc()
            return
        if isinstance(frame, Row) and not running.first_id_seen:
            running.first_id_seen = True
            self._metrics.first_token_s.observe(self._now().mono_s - running.started_at_s)
        before = running.session.node
        self._carry_out(running, running.session.on_frame(node, frame, self._now()))
        if before is not None and isinstance(frame, Failed) and running.session.promised:
            self._note_move(running.session, before, "failover")

    def _move_from(self, nodes: Collection[str], *, stop: bool) -> None:
        """Continue the streams of `nodes` elsewhere. stop: the link is up, so tell the node to forget them."""
        for running, node in self._on(nodes):
            session = running.session
            if stop:
                self._links.send(node, Cancel(session.record.id, session.epoch))
            self._carry_out(running, session.on_node_lost(node, self._now()))
            self._note_move(session, node, "failover")

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

    def _move_if_possible(self, suspects: Collection[str]) -> None:
        """A suspect's streams go elsewhere if somebody can take them; else it may still go on with them."""
        for running, node in self._on(suspects):
            session = running.session
            able = self._able(session, promised=True)
            self._carry_out(running, session.on_suspicion(able, self._now()))
            self._note_move(session, node, "failover")

    def _hand_over(self, leaving: Collection[str]) -> None:
        """A draining node's streams go to whoever has room for them; until somebody has, it goes on with them."""
        for running, node in self._on(leaving):
            session = running.session
            able = self._able(session, promised=False)
            self._carry_out(running, session.on_drain(able, self._now()))
            self._note_move(session, node, "handoff")

    def _able(self, session: Session, *, promised: bool) -> Callable[[NeedNode], bool]:
        return lambda needed: self._choose(session, needed, promised=promised) is not None

    def _on(self, nodes: Collection[str]) -> list[tuple[Running, str]]:
        """The running responses of these nodes."""
        if not nodes:
            return []
        placed = [(running, running.session.node) for running in self._table.values()]
        return [(running, node) for running, node in placed if node is not None and node in nodes]

    def _note_move(self, session: Session, before: str, kind: str) -> None:
        """Log and count it if the stream is not where it was."""
        if session.node == before or (session.ended and session.node is None):
            return
        self._metrics.moved_streams.labels(kind).inc()
        name, ids = self._name_of(before), len(session.ids)
        if session.node is None:
            log.warning("stream %s was on node %s and waits for another after %d ids", session.record.id, name, ids)
        else:
            now = self._name_of(session.node)
            log.info("stream %s moves from node %s to %s after %d ids (%s)", session.record.id, name, now, ids, kind)

    # -- effects -------------------------------------------------------------------------------

    def _carry_out(self, running: Running, effects: Iterable[Effect]) -> None:
        todo = deque(effects)
        session = running.session
        while todo:
            match todo.popleft():
                case SendNode(node, frame):
                    todo.extend(self._send(session, node, frame))
                case NeedNode() as needed:
                    todo.extend(self._assign(session, needed))
                case Write(entry):
                    self._journal.put(entry, lambda outcome: self._written(running, outcome))
                case Deliver(events):
                    for reader in list(running.readers):
                        reader.on_events(events)
                case Serving(url):
                    # Not any more, if sending to it has just failed.
                    if (session.ended or url == session.node) and (chosen := self._fleet.nodes.get(url)):
                        for reader in list(running.readers):
                            reader.on_serving(chosen)
                case Reading(computed, total):
                    for reader in list(running.readers):
                        reader.on_reading(computed, total)
                case Finished(response):
                    self._finish(running, response)
                case Refused(failure):
                    self._refuse(running, failure)

    def _written(self, running: Running, outcome: Outcome) -> None:
        if outcome != "kept":
            self._journal.drop(running.record.id)
        try:
            self._carry_out(running, running.session.on_written(outcome))
        except Exception:
            # The others of the batch have to hear of theirs.
            log.exception("the response %s stumbled over what was written", running.record.id)
            self._carry_out(running, running.session.suspend(EdgechatError(MISTAKE)))

    def _assign(self, session: Session, needed: NeedNode) -> list[Effect]:
        choice = self._choose(session, needed, promised=session.promised)
        if not self._seen_ready:
            session.on_nobody_yet(self._now())
        if choice is not None and needed.variant not in ("", choice.variant):
            self._metrics.crossed_variants.inc()
        return session.assign(None if choice is None else _place(choice), self._now())

    def _choose(self, session: Session, needed: NeedNode, *, promised: bool) -> Choice | None:
        return choose(
            self._fleet.ready(self._now().mono_s),
            needed.release,
            needed.exclude,
            lambda _: session.prefix_keys,
            yields=terms.priority(session.record.request) < 0,
            variant=needed.variant,
            context_tokens=needed.context_tokens,
            promised=promised,
        )

    def _send(self, session: Session, node: str, frame: Generate | Cancel) -> list[Effect]:
        sent = self._links.send(node, frame)
        if isinstance(frame, Cancel):
            return []
        if not sent:
            return session.on_node_lost(node, self._now())
        self._fleet.on_dispatch(node)
        return []

    def _refuse(self, running: Running, failure: Failure) -> None:
        self._table.pop(running.record.id, None)
        for reader in list(running.readers):
            reader.on_refused(failure)
        running.over.set()

    def _finish(self, running: Running, response: StoredResponse) -> None:
        self._table.pop(response.record.id, None)
        self._metrics.on_end(response.end.status, len(response.ids), running.session.dropped_frames)
        for reader in list(running.readers):
            reader.on_end(response)
        running.over.set()


def _place(choice: Choice) -> Place:
    return Place(choice.node.url, choice.variant, choice.node.hello.context_tokens)


def beyond(starting_after: int, last: int) -> RequestError:
    """Why a response cannot be read from there on; last: the number of the latest event, -1 if there is none."""
    sentence = f"`starting_after` is {starting_after}, but the latest event is {last}; name one that you have seen."
    return RequestError(sentence, param="starting_after")


def response_object(response: StoredResponse) -> dict[str, object]:
    """The response object of a finished response."""
    log_ = StreamLog(response.record)
    log_.extend(response.deltas)
    log_.close(response.end)
    return log_.response()
