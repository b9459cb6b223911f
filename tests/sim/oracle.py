"""What must be true whatever happens, checked as it happens and once more at the end.

Everything is derived from what the simulation itself saw (what the database took, what nodes did, what clients asked),
never from the state of what is tested. The rules are section 6 of docs/ARCHITECTURE.md:

- what is written of a response is a prefix of what an undisturbed node would have said, each id once;
- nothing is told that is not written, every reader hears the same bytes, and each event once;
- one end, the same for all; a failure has a reason in what happened; whoever was not stopped is completed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from core.errors import DeadlineExceeded, PoisonedRequest
from core.stream import EndRecord, Event, RequestRecord, StreamLog, replay
from router.journal import (
    LEASE_S,
    Began,
    Dropped,
    Ended,
    Entry,
    Outcome,
    Placed,
    Read,
    Said,
    StoredResponse,
    Unfinished,
)
from tests.fake_store import FakeDatabase, Owner
from tests.sim import speech
from tests.sim.node import Node
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.router import SimRouter

LAST = {"response.completed", "response.incomplete", "response.failed"}
MAX_FRUITLESS_LOSSES = 5
# A node that came back is found by the next tick; one that left may be asked until its last word is here.
SLACK_S = 2.0


def writing_s(router: SimRouter) -> float:
    """An end is written a little after it was decided: two batches' time, to be sure."""
    return 0.1 + 0.1 * router.store_delay


class Violation(AssertionError):
    """What must not be."""


class Expected(NamedTuple):
    """What an undisturbed node says. events: without the end; after[n]: how many of them n ids make."""

    said: speech.Said
    events: list[Event]
    after: list[int]


@dataclass(eq=False)
class Facts:
    """What the simulation knows of one response."""

    record: RequestRecord
    created_s: float
    placed: Placed | None = None
    began: bool = False
    owner: Owner | None = None
    epoch: int = 0
    count: int = 0
    ended: StoredResponse | None = None
    told: int = -1
    told_end: bool = False
    last_word_s: float = 0.0
    dispatches: int = 0
    dispatched_after: int = 0
    dispatched_s: float = 0.0
    cancel_asked: bool = False
    delete_asked: bool = False
    deleted: bool = False
    dropped: bool = False
    expected: dict[tuple[int, int], Expected] = field(default_factory=dict)
    readers: dict[tuple[str, int], int] = field(default_factory=dict)
    read_until_s: dict[tuple[str, int], float] = field(default_factory=dict)
    joined_s: float = 0.0
    logs: list[ReaderLog] = field(default_factory=list)

    @property
    def stored(self) -> bool:
        return self.record.request.store

    def expect(self, dropped: int, room: int) -> Expected:
        """room: what its tokens fit into, prompt included."""
        if (known := self.expected.get((dropped, room))) is not None:
            return known
        request = self.record.request
        prompt = speech.read(request.input, dropped)
        said = speech.answer(prompt, self.record.seed, min(request.max_output_tokens, room - prompt.tokens))
        log = StreamLog(self.record)
        events = log.open()
        after = [len(events)]
        for deltas in said.deltas:
            events += log.extend([deltas])
            after.append(len(events))
        made = self.expected[dropped, room] = Expected(said, events, after)
        return made

    @property
    def expected_now(self) -> Expected | None:
        """None until its prompt was read."""
        return None if self.placed is None else self.expect(self.placed.dropped_items, self.placed.context_tokens)


@dataclass(eq=False)
class ReaderLog:
    """All that one reader has heard of one response, over all its connections. gone: it was told 404."""

    name: str
    events: list[Event] = field(default_factory=list)
    ended: bool = False
    gone: bool = False
    left: bool = False

    def hear(self, events: list[Event]) -> None:
        for event in events:
            number = event["sequence_number"]
            if number != len(self.events):
                raise Violation(f"{self.name} was told event {number} in the place of {len(self.events)}")
            if self.ended:
                raise Violation(f"{self.name} was told event {number} after the end")
            self.events.append(event)
            self.ended = event["type"] in LAST


class Oracle:
    """Raises Violation as soon as something cannot be right."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.book: dict[str, Facts] = {}
        self.nodes: list[Node] = []
        self.databases: list[FakeDatabase] = []
        self._beats: dict[Owner, float] = {}

    # -- what clients do -----------------------------------------------------------------------

    def created(self, record: RequestRecord) -> Facts:
        facts = self.book[record.id] = Facts(record, self.world.now, last_word_s=self.world.now)
        return facts

    def dispatched(self, response_id: str, ids: int) -> None:
        """A node is asked to go on after so many ids."""
        facts = self.book[response_id]
        facts.dispatches = facts.dispatches + 1 if ids == facts.dispatched_after else 1
        facts.dispatched_after, facts.dispatched_s = ids, self.world.now

    def joined(self, router: SimRouter, facts: Facts) -> None:
        key = router.name, router.process.life
        facts.readers[key] = facts.readers.get(key, 0) + 1
        facts.joined_s = self.world.now

    def left(self, router: SimRouter, facts: Facts) -> None:
        key = router.name, router.process.life
        facts.readers[key] -= 1
        facts.read_until_s[key] = self.world.now

    def not_found(self, facts: Facts) -> None:
        if facts.stored and not facts.delete_asked:
            raise Violation(f"{facts.record.id} was told to a client and is not found any more")

    def beyond(self, router: SimRouter, facts: Facts, starting_after: int) -> None:
        """A reader knows more than the router has said: possible only where another router has taken over."""
        self.world.note("asked beyond")
        if facts.owner == router.store.store.owner and facts.ended is None:
            raise Violation(f"{router.name} owns {facts.record.id} and has not said event {starting_after} yet")

    def deleted(self, facts: Facts) -> None:
        facts.deleted = True
        self.world.note("deletions")
        self._check_gone(facts)

    def _check_gone(self, facts: Facts) -> None:
        name = facts.record.id
        for database in self.databases:
            if name in database.running or (facts.record.tenant, name) in database.finished:
                raise Violation(f"{name} was deleted and is in the store")

    # -- what is told --------------------------------------------------------------------------

    def delivered(self, router: SimRouter, facts: Facts, events: list[Event]) -> None:
        """Something is handed to a reader's connection; it must be in the store by now."""
        last = events[-1]["sequence_number"]
        ends = events[-1]["type"] in LAST
        if facts.stored:
            if ends and facts.ended is None and not facts.dropped:
                raise Violation(f"{router.name} tells the end of {facts.record.id} before it is written")
            if not facts.began and facts.ended is None:
                raise Violation(f"{router.name} tells of {facts.record.id} before its beginning is written")
            expected = facts.expected_now
            most = 2 if expected is None else expected.after[min(facts.count, len(expected.after) - 1)]
            if not (ends or facts.ended is not None) and last >= most:
                raise Violation(
                    f"{router.name} tells event {last} of {facts.record.id} when {facts.count} ids are written"
                )
        if last > facts.told:
            facts.told, facts.told_end = last, facts.told_end or ends
            if not facts.stored and not ends:
                facts.last_word_s = self.world.now

    # -- what is written -----------------------------------------------------------------------

    def beat(self, owner: Owner) -> None:
        self._beats[owner] = self.world.now

    def released(self, owner: Owner) -> None:
        self._beats.pop(owner, None)

    def claimed(self, router: SimRouter, owner: Owner, before: Owner, unfinished: Unfinished) -> None:
        facts = self.book[unfinished.record.id]
        self.world.note("claims")
        self.world.trace(router.name, f"claims {unfinished.record.id} after {len(unfinished.ids)} ids from {before}")
        if facts.owner != before:
            raise Violation(f"{unfinished.record.id} was claimed from {before}, but {facts.owner} owns it")
        if before != owner and self._beats.get(before, float("-inf")) + LEASE_S > self.world.now:
            raise Violation(f"{owner} claims {unfinished.record.id}, whose owner {before} has a lease")
        if unfinished.epoch <= facts.epoch and facts.epoch:
            raise Violation(f"{unfinished.record.id} was claimed with epoch {unfinished.epoch} after {facts.epoch}")
        if len(unfinished.ids) != facts.count:
            raise Violation(f"{unfinished.record.id} has {facts.count} ids written, {len(unfinished.ids)} were claimed")
        facts.owner, facts.epoch, facts.last_word_s = owner, unfinished.epoch, self.world.now
        facts.dispatches = 0
        facts.read_until_s[router.name, router.process.life] = self.world.now

    def wrote(self, router: SimRouter, owner: Owner, entries: list[Entry], outcomes: list[Outcome]) -> None:
        for entry, outcome in zip(entries, outcomes, strict=True):
            self.world.note(f"{outcome} entries")
            facts = self.book[entry.id]
            if not facts.stored:
                raise Violation(f"{entry.id} is not to be stored, and {type(entry).__name__} of it was written")
            if outcome != "kept":
                self.world.trace(router.name, f"{type(entry).__name__} of {entry.id} is {outcome}")
                continue
            if not isinstance(entry, Began) and facts.owner not in (owner, None):
                raise Violation(f"{owner} wrote {type(entry).__name__} of {entry.id}, which {facts.owner} owns")
            if facts.ended is not None or facts.dropped:
                raise Violation(f"{type(entry).__name__} of {entry.id} was kept after its end")
            match entry:
                case Began():
                    facts.began, facts.owner = True, owner
                case Read(_, placed):
                    if facts.count:
                        raise Violation(f"the prompt of {entry.id} is settled after {facts.count} ids")
                    facts.placed = placed
                case Said(_, seq, ids, _):
                    self._said(facts, seq, ids)
                case Ended(response):
                    self._ended(router, facts, response)
                case Dropped():
                    facts.dropped = True
                    if not facts.delete_asked:
                        raise Violation(f"{entry.id} was dropped, and nobody asked for it")
            facts.last_word_s = self.world.now

    def _said(self, facts: Facts, seq: int, ids: list[int]) -> None:
        expected = facts.expected_now
        if seq != facts.count or expected is None:
            raise Violation(f"ids {seq}... of {facts.record.id} are written when {facts.count} are there")
        if expected.said.ids[seq : seq + len(ids)] != ids:
            raise Violation(f"ids {seq}... of {facts.record.id} are {ids}, not {expected.said.ids[seq:][: len(ids)]}")
        facts.count += len(ids)

    def _ended(self, router: SimRouter, facts: Facts, response: StoredResponse) -> None:
        facts.ended = response
        facts.count = len(response.ids)
        if facts.placed is None:
            # All before the end was refused, and the end needs none of it.
            facts.placed = self._guess(facts, response)
        self.world.note(f"{response.end.status} responses")
        self._check_end(router, facts, response)

    # -- ends ----------------------------------------------------------------------------------

    def _check_end(self, router: SimRouter, facts: Facts, response: StoredResponse) -> None:
        name, end = facts.record.id, response.end
        expected = facts.expected_now
        if expected is None:
            if response.ids or end.status == "completed":
                raise Violation(f"{name} ended as {end.status} with {len(response.ids)} ids, its prompt never read")
        else:
            count = len(response.ids)
            if response.ids != expected.said.ids[:count] or response.deltas != expected.said.deltas[:count]:
                raise Violation(f"{name} does not say what an undisturbed node would have said")
            self._check_usage(facts, end, expected, count)
            if end.status == "completed" and (count, expected.said.finish) != (len(expected.said.ids), "stop"):
                raise Violation(f"{name} is completed after {count} of {len(expected.said.ids)} ids")
            if end.reason is not None and (count, expected.said.finish) != (len(expected.said.ids), "length"):
                raise Violation(f"{name} is cut after {count} of {len(expected.said.ids)} ids")
        if end.status == "cancelled" and not facts.cancel_asked and not facts.delete_asked:
            self._check_orphan(router, facts)
        if end.status == "failed":
            self._check_failure(router, facts, end)

    def _check_usage(self, facts: Facts, end: EndRecord, expected: Expected, count: int) -> None:
        usage, placed = end.usage, facts.placed
        if usage is None or placed is None:
            raise Violation(f"{facts.record.id} ended as {end.status} without usage")
        if (usage.input_tokens, usage.output_tokens) != (placed.input_tokens, count):
            raise Violation(f"{facts.record.id} has {placed.input_tokens} + {count} tokens, its usage says {usage}")
        whole = end.status == "completed" or end.reason is not None
        if whole and usage.reasoning_tokens != expected.said.reasoning_tokens:
            raise Violation(f"{facts.record.id} has {expected.said.reasoning_tokens} of reasoning, not {usage}")

    def _check_orphan(self, router: SimRouter, facts: Facts) -> None:
        from tests.sim.router import ORPHAN_GRACE_S

        now, name = self.world.now, facts.record.id
        if not facts.stored:
            if not router.draining:
                raise Violation(f"{name} was cancelled, and nobody asked for it")
            return
        self.world.note("orphans")
        key = router.name, router.process.life
        alone_s = now - facts.read_until_s.get(key, float("-inf"))
        if now - facts.joined_s <= writing_s(router):
            return  # somebody came when it was decided
        if facts.readers.get(key, 0) > 0:
            raise Violation(f"{router.name} cancelled {name}, which has a reader")
        if alone_s < ORPHAN_GRACE_S - 0.01:
            raise Violation(f"{name} was cancelled {alone_s:.2f} s after its last reader had left")

    def _check_failure(self, router: SimRouter, facts: Facts, end: EndRecord) -> None:
        from tests.sim.router import FAILOVER_WAIT_S

        name, error, now = facts.record.id, end.error, self.world.now
        if error is None:
            raise Violation(f"{name} failed without a reason")
        self.world.note(f"failed: {error.code}")
        match error.code:
            case PoisonedRequest.code:
                if sum(node.deaths.get(name, 0) for node in self.nodes) < 2:
                    raise Violation(f"{name} is called poisoned, and no two engines died under it")
                return
            case DeadlineExceeded.code:
                deadline_s = facts.record.request.deadline_s
                # After an adoption the time of arrival is known to the second.
                if not deadline_s or now - facts.created_s < deadline_s - 1.0:
                    raise Violation(f"{name} is out of time {now - facts.created_s:.1f} s after it arrived")
                return
            case "context_length_exceeded":
                request = facts.record.request
                auto = request.truncation == "auto"
                if all(
                    speech.fitted(request.input, node.build.context_tokens, request.max_output_tokens, auto) is not None
                    for node in self.nodes
                ):
                    raise Violation(f"{name} is too long, but has room everywhere")
                return
        if not error.retryable:
            raise Violation(f"{name} failed for good: {error}")
        # One more than were asked in vain: the node that had said the last id.
        if facts.dispatches >= MAX_FRUITLESS_LOSSES - 1:
            return
        waited_s = now - facts.last_word_s
        if waited_s < FAILOVER_WAIT_S - 0.5:
            raise Violation(f"{name} failed ({error.code}) after waiting for {waited_s:.1f} s")
        since_s = now - FAILOVER_WAIT_S
        refused = any(node.refusals.get(name, float("-inf")) >= since_s - writing_s(router) for node in self.nodes)
        # Who gives way to everybody gets a free slot or nothing, also when it is to go on.
        refused |= facts.record.request.service_tier == "flex"
        room = facts.placed.context_tokens if facts.placed else 0
        # A node that was asked and said nothing before it was lost was there in vain.
        until_s = facts.dispatched_s if facts.dispatched_s > facts.last_word_s else now
        if not refused and (able_s := router.able_for_s(room, since_s, until_s)) > SLACK_S:
            raise Violation(f"{name} failed ({error.code}), although a node was there for {able_s:.1f} s")

    def ended_unstored(self, router: SimRouter, facts: Facts, response: StoredResponse) -> None:
        """The end of a response that is not kept, as its one reader is told it."""
        request = facts.record.request
        facts.ended = response
        self.world.note(f"{response.end.status} unstored responses")
        placed = self._guess(facts, response)
        if placed is None and response.ids:
            raise Violation(f"{facts.record.id} says what no node would have said to {request.input!r:.80}")
        facts.placed = placed
        self._check_end(router, facts, response)

    def _guess(self, facts: Facts, response: StoredResponse) -> Placed | None:
        """A placing that nobody wrote down: the one that explains what was said."""
        usage = response.end.usage
        whole = response.end.status == "completed" or response.end.reason is not None
        for placed in self._placings(facts):
            said = facts.expect(placed.dropped_items, placed.context_tokens).said
            fits = said.ids == response.ids if whole else said.ids[: len(response.ids)] == response.ids
            if usage is not None and usage.input_tokens == placed.input_tokens and fits:
                return placed
        return None

    def _placings(self, facts: Facts) -> list[Placed]:
        """How the nodes, by size, would have placed a request."""
        request, placings = facts.record.request, []
        for size in sorted({node.build.context_tokens for node in self.nodes}):
            dropped = speech.fitted(request.input, size, request.max_output_tokens, request.truncation == "auto")
            if dropped is not None:
                tokens = speech.read(request.input, dropped).tokens
                placings.append(Placed(tokens, 0, dropped, "", min(size, tokens + request.max_output_tokens)))
        return placings

    # -- at the end of time --------------------------------------------------------------------

    def check_all(self) -> None:
        """Everything has healed, and everybody has had time."""
        for facts in self.book.values():
            self._check_response(facts)

    def _check_response(self, facts: Facts) -> None:
        name, ended = facts.record.id, facts.ended
        kept = [1 for database in self.databases if (facts.record.tenant, name) in database.finished]
        if facts.deleted:
            self._check_gone(facts)
        elif facts.stored and len(kept) != (ended is not None and not (facts.delete_asked and not kept)):
            raise Violation(f"{name} is {len(kept)} times in the stores, its end is {ended and ended.end}")
        if not facts.stored and kept:
            raise Violation(f"{name} is not to be stored, and is")
        if facts.stored and facts.began and ended is None and not facts.dropped and not facts.delete_asked:
            raise Violation(f"{name} began and has no end")
        if ended is None:
            whole, events = None, self._events_without_end(facts)
        else:
            whole = events = replay(facts.record, ended.deltas, ended.end)
        for log in facts.logs:
            self._check_log(facts, log, events, whole)

    def _events_without_end(self, facts: Facts) -> list[Event]:
        """What can have been told of a response that nobody heard the end of."""
        if (known := facts.expected_now) is not None:
            return known.events
        if facts.stored:
            return StreamLog(facts.record).open()
        heard = max((log.events for log in facts.logs), key=len)
        possible = [
            facts.expect(placed.dropped_items, placed.context_tokens).events for placed in self._placings(facts)
        ]
        matching = (events for events in possible if events[: len(heard)] == heard)
        return next(matching, StreamLog(facts.record).open())

    def _check_log(self, facts: Facts, log: ReaderLog, events: list[Event], whole: list[Event] | None) -> None:
        name = facts.record.id
        heard = log.events
        if whole is None and log.ended:
            # Deleted while it ran: its readers hear that it was cancelled, and there is nothing to compare with.
            if not facts.dropped:
                raise Violation(f"{log.name} heard an end of {name}, which has none")
            while heard and heard[-1]["type"] != "response.output_text.delta":
                heard = heard[:-1]
        encode = msgspec.json.encode
        if encode(heard) != encode(events[: len(heard)]):
            first = next(i for i, one in enumerate(heard) if i >= len(events) or encode(one) != encode(events[i]))
            right = events[first] if first < len(events) else "nothing"
            raise Violation(f"{log.name} heard of {name} {heard[first]!r:.300} where it should be {right!r:.300}")
        if log.ended and whole is not None and len(heard) != len(whole):
            raise Violation(f"{log.name} heard an end of {name} after {len(heard)} of {len(whole)} events")
        if heard and not (log.ended or log.left or log.gone) and facts.stored:
            raise Violation(f"{log.name} never heard the end of {name}")
