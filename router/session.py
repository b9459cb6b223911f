"""The session: the state machine of one response, from dispatch to its terminal event.

    placed --node lost, drained or not trusted--> looking for a node --assign--> placed, epoch + 1 --> ... --> ended

A response is promised when a node has first said anything about it: until then a refusal (too long, no room, no node)
is an error and no response, whatever the client speaks. What was promised waits for a node if there is none.

Events and an `Instant` go in, effects come out; the caller carries them out in order. Does not know
sockets, the store, how a node is chosen or what clients speak (`router/api` translates the events).

Fencing: every frame names its epoch; frames of another epoch, or after the end, are dropped and counted.
Order: a row's `seq` must be the number of ids already taken; ids seen before are dropped, a gap is an error.
Write ahead: of a stored response nothing is delivered before what it follows from is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from core.conversation import Item
from core.errors import DeadlineExceeded, EdgechatError, NodeLost, NoNodeAvailable, PoisonedRequest
from core.frames import Cancel, Delta, Done, Failed, Generate, Progress, Row, Started, Usage
from core.stream import EndRecord, Event, Failure, RequestRecord, StreamLog, replay
from router import terms
from router.effects import (
    Deliver,
    Effect,
    Finished,
    NeedNode,
    Place,
    Reading,
    Refused,
    SendNode,
    Serving,
    Write,
)
from router.errors import Draining, ResponseMoved
from router.journal import Began, Dropped, Ended, Entry, Outcome, Placed, Read, Said, StoredResponse, Unfinished
from router.journal import store_failure as unwritable

MAX_UNPROMISED_DISPATCHES = 3
"""Nodes that are asked to accept a request; then its client may as well come back later."""
MAX_FRUITLESS_LOSSES = 5
"""Nodes lost in a row while they worked on it, without one new id: whatever the reason, it follows this request."""
MAX_CRASHES = 2
"""Engines that a request may have died under it."""
NOT_HERE = frozenset({"overloaded", "draining", "model_not_found"})
"""Why a node sends a stream elsewhere before it has done anything for it."""


class Instant(NamedTuple):
    """Both clocks at once: `mono_s` for durations (never jumps), `unix_s` for what people read."""

    mono_s: float
    unix_s: int


NodeFrame: TypeAlias = Started | Progress | Row | Done | Failed


class Session:
    """Invariants: at most one node is responsible at a time, under the current `epoch`; every id in `ids` is turned
    into events exactly once; exactly one `Finished` or `Refused` is ever returned, last.

    items: the whole conversation to be rendered, instructions and history included.
    prefix_keys: `core.conversation.prefix_keys` of them.
    orphan_grace_s: how long a stored response goes on without a reader.
    failover_wait_s: how long one that was promised waits for a node.
    name_of: what people call a node; its key here is its address, which is not for clients.
    """

    def __init__(
        self,
        record: RequestRecord,
        items: list[Item],
        *,
        cache_salt: str,
        orphan_grace_s: float,
        failover_wait_s: float,
        prefix_keys: Sequence[str] = (),
        name_of: Callable[[str], str] = str,
    ) -> None:
        self.record = record
        self.items = items
        self.prefix_keys = prefix_keys
        self.log = StreamLog(record)
        self.ids: list[int] = []
        self.deltas: list[list[Delta]] = []
        self.epoch = 0
        self.node: str | None = None
        self.placed: Placed | None = None
        self.dropped_frames = 0
        self.ended = False
        self._cache_salt = cache_salt
        self._orphan_grace_s = orphan_grace_s
        self._failover_wait_s = failover_wait_s
        self._name_of = name_of
        self._first_epoch = 0
        self._place: Place | None = None
        self._reading: Reading | None = None
        self._promised = False
        self._opened = False
        self._told = 0
        self._over = False
        self._end: EndRecord | None = None
        self._unwritten: deque[Entry] = deque()
        self._lost: set[str] = set()
        self._refusing: set[str] = set()
        self._moved_because: Failure | None = None
        self._homeless_at_s: float | None = None
        self._heard = False
        self._fruitless_losses = 0
        self._crashes = 0
        self._arrived_at_s = 0.0
        self._readers = 1
        self._orphaned_at_s: float | None = None

    # -- beginnings ----------------------------------------------------------------------------

    def start(self, place: Place, now: Instant, arrived_at_s: float) -> list[Effect]:
        """Begin on a node; its first word opens the log. arrived_at_s: from when (monotonic) the deadline counts."""
        self._arrived_at_s = arrived_at_s
        return self.assign(place, now)

    def warm_up(self, now: Instant) -> list[Effect]:
        """Answer with nothing, without a node: the id can be continued from."""
        self._promised = True
        return self._finish(EndRecord(status="completed", completed_at=now.unix_s, usage=Usage(0, 0, 0)))

    def resume(self, begun: Unfinished, now: Instant) -> list[Effect]:
        """Go on with what another router, or another life of this one, has written down; nobody reads it yet."""
        self._first_epoch = self.epoch = begun.epoch
        self.placed = begun.placed
        self.ids, self.deltas, self._told = list(begun.ids), list(begun.deltas), len(begun.ids)
        self._promised = self._opened = True
        self.log.open()
        self.log.extend(begun.deltas)
        # All that is left of the arrival is its date; a clock that was set back gives no more time than there was.
        self._arrived_at_s = now.mono_s - max(0, now.unix_s - self.record.created_at)
        self._readers, self._orphaned_at_s = 0, now.mono_s
        self._homeless_at_s = now.mono_s
        return [self._need()]

    # -- where it is answered ------------------------------------------------------------------

    @property
    def homeless(self) -> bool:
        """Whether it waits for a node."""
        return self.node is None and not self.ended

    @property
    def promised(self) -> bool:
        """Whether a node has accepted it, so that its client may expect an answer."""
        return self._promised

    def assign(self, place: Place | None, now: Instant) -> list[Effect]:
        """The answer to `NeedNode`; None = there is none at present."""
        if self.ended:
            return []
        if place is None:
            return self._wait(now)
        left_s = self._time_left_s(now)
        if left_s is not None and left_s <= 0:
            return self._fail(_failure(DeadlineExceeded(self.record.request.deadline_s)), now)
        self.node, self._place, self._heard = place.node, place, False
        self.epoch += 1
        return [SendNode(place.node, self._generate(left_s or 0.0)), *self._serving()]

    def _wait(self, now: Instant) -> list[Effect]:
        because = self._moved_because or _failure(NoNodeAvailable(self.record.request.model))
        if not self._promised:
            return self._fail(because, now)
        if self._homeless_at_s is None:
            self._homeless_at_s = now.mono_s
        left_s = self._time_left_s(now)
        if left_s is not None and left_s <= 0:
            return self._fail(_failure(DeadlineExceeded(self.record.request.deadline_s)), now)
        return self._fail(because, now) if now.mono_s - self._homeless_at_s >= self._failover_wait_s else []

    def on_nobody_yet(self, now: Instant) -> None:
        """No node was ready since this router started, so none can be missed: the wait begins later."""
        if self._homeless_at_s is not None:
            self._homeless_at_s = now.mono_s

    def on_node_lost(self, node: str, now: Instant) -> list[Effect]:
        """The link of `node` broke or its engine is gone under this stream: another node continues by ids."""
        if self.ended or node != self.node:
            return []
        self._lost.add(node)
        # One that had not answered yet proves nothing: many links may break at once.
        self._fruitless_losses += self._heard
        because = _failure(NodeLost(self._name_of(node)))
        if self._fruitless_losses >= MAX_FRUITLESS_LOSSES:
            self.node = None
            return self._fail(because, now)
        return self._move(because, now)

    def on_node_renewed(self, node: str) -> None:
        """The node has said Hello again, or has a new engine: what was lost with the old one is no argument."""
        self._lost.discard(node)

    def on_suspicion(self, able: Callable[[NeedNode], bool], now: Instant) -> list[Effect]:
        """The link of the node is up, but it cannot be trusted: move if that helps, else wait for it.

        able: whether somebody can take what this stream needs. Waiting ends with the request's time: a node in
        such a state may not notice.
        """
        node = self.node
        if self.ended or node is None:
            return []
        left_s = self._time_left_s(now)
        if left_s is not None and left_s <= 0:
            return self._fail(_failure(DeadlineExceeded(self.record.request.deadline_s)), now)
        return self._leave(node, able, now)

    def on_drain(self, able: Callable[[NeedNode], bool], now: Instant) -> list[Effect]:
        """The node wants to stop: hand the stream over as soon as somebody can take it."""
        return [] if self.ended or self.node is None else self._leave(self.node, able, now)

    def _leave(self, node: str, able: Callable[[NeedNode], bool], now: Instant) -> list[Effect]:
        if not able(self._need(besides=node)):
            return []
        stopped = self._stop_node()
        self._refusing.add(node)
        return [*stopped, *self._move(_failure(NodeLost(self._name_of(node))), now)]

    def _move(self, because: Failure, now: Instant) -> list[Effect]:
        self.node = None
        self._moved_because = because
        if self._promised and self._homeless_at_s is None:
            self._homeless_at_s = now.mono_s
        if not self._promised and self.epoch >= MAX_UNPROMISED_DISPATCHES:
            return self._fail(because, now)
        return [self._need()]

    def _need(self, besides: str = "") -> NeedNode:
        exclude = self._lost | self._refusing | ({besides} if besides else set())
        variant, context_tokens = (self.placed.variant, self.placed.context_tokens) if self.placed else ("", 0)
        return NeedNode(self.record.release, frozenset(exclude), variant, context_tokens)

    def _time_left_s(self, now: Instant) -> float | None:
        """Until the request's deadline; None if it has none."""
        deadline_s = self.record.request.deadline_s
        return self._arrived_at_s + deadline_s - now.mono_s if deadline_s else None

    def _generate(self, deadline_s: float) -> Generate:
        """The same for every node that is asked, but for what is already said and the time that is left."""
        request = self.record.request
        return Generate(
            stream=self.record.id,
            epoch=self.epoch,
            release=self.record.release,
            items=self.items,
            output_ids=list(self.ids),
            seed=self.record.seed,
            sampling=terms.sampling(request),
            stop=request.stop,
            max_output_tokens=self._most_output_tokens(),
            tools=terms.offered_tools(request),
            format=terms.answer_format(request),
            effort=terms.effort(request),
            truncation=request.truncation,
            # Later epochs must cut the conversation where the first did, or the ids would not fit the prompt.
            dropped_items=self.placed.dropped_items if self.placed else 0,
            priority=terms.priority(request),
            cache_salt=self._cache_salt,
            prefix_keys=list(self.prefix_keys),
            deadline_s=deadline_s,
            exact=request.exact,
        )

    def _most_output_tokens(self) -> int:
        """Where the first node's context ends the answer, it ends on a larger node as well."""
        most = self.record.request.max_output_tokens
        return most if self.placed is None else min(most, self.placed.context_tokens - self.placed.input_tokens)

    # -- what the node says --------------------------------------------------------------------

    def on_frame(self, node: str, frame: NodeFrame, now: Instant) -> list[Effect]:
        """A frame about this stream from `node`."""
        if self.ended or node != self.node or frame.epoch != self.epoch:
            self.dropped_frames += 1
            return []
        if isinstance(frame, Failed):
            return self._on_failed(node, frame, now)
        self._homeless_at_s, self._heard = None, True
        return [*self._promise(), *self._on_word(frame, now)]

    def _promise(self) -> list[Effect]:
        if self._promised:
            return []
        self._promised = True
        return self._put(Began(Unfinished(self.record, self.items, self._first_epoch)))

    def _on_word(self, frame: Started | Progress | Row | Done, now: Instant) -> list[Effect]:
        match frame:
            case Started():
                return self._on_started(frame)
            case Progress():
                self._reading = Reading(frame.computed, frame.total)
                return [self._reading] if self._opened else []
            case Row():
                return self._on_row(frame, now)
            case Done():
                return self._on_done(frame, now)

    def _on_started(self, started: Started) -> list[Effect]:
        if self.placed is not None or self._place is None:
            return []
        room = min(started.input_tokens + self.record.request.max_output_tokens, self._place.context_tokens)
        self.placed = Placed(
            started.input_tokens, started.cached_tokens, started.dropped_items, self._place.variant, room
        )
        return self._put(Read(self.record.id, self.placed))

    def _on_row(self, row: Row, now: Instant) -> list[Effect]:
        known = len(self.ids) - row.seq
        if known < 0 or len(row.ids) != len(row.deltas):
            name = self._name_of(self.node or "")
            gap = EdgechatError(f"The node {name!r} skipped output ids; send the request again.")
            return self._fail(_failure(gap), now)
        ids, deltas = row.ids[known:], row.deltas[known:]
        if not ids:
            return []
        said = Said(self.record.id, len(self.ids), ids, deltas)
        self.ids.extend(ids)
        self.deltas.extend(deltas)
        self._refusing.clear()
        self._fruitless_losses = 0
        return self._put(said)

    def _on_done(self, done: Done, now: Instant) -> list[Effect]:
        match done.finish:
            case "stop":
                end = EndRecord(status="completed", completed_at=now.unix_s, usage=done.usage)
            case "length":
                reason = "max_output_tokens"
                end = EndRecord(status="incomplete", completed_at=now.unix_s, reason=reason, usage=done.usage)
            case "cancelled":
                end = EndRecord(status="cancelled", completed_at=now.unix_s, usage=done.usage)
        return self._finish(end)

    def _on_failed(self, node: str, failed: Failed, now: Instant) -> list[Effect]:
        match failed.code:
            case "engine_lost" if failed.retryable:
                self._crashes += 1
                if self._crashes >= MAX_CRASHES:
                    return self._finish_failed(_failure(PoisonedRequest()), now)
                return self.on_node_lost(node, now)
            case "engine_stalled" if failed.retryable:
                return self.on_node_lost(node, now)
            case ResponseMoved.code:
                # It knows of a higher epoch, which only another router can have given.
                self.node = None
                return self._stop_here(_failure(ResponseMoved()))
            case DeadlineExceeded.code:
                # A node that went on with the answer knows only the rest of its time.
                return self._finish_failed(_failure(DeadlineExceeded(self.record.request.deadline_s)), now)
        failure = Failure(failed.code, failed.message, failed.retryable, failed.param)
        if failed.retryable and failed.code in NOT_HERE:
            self._refusing.add(node)
            return self._move(failure, now)
        return self._finish_failed(failure, now)

    # -- what the client does ------------------------------------------------------------------

    def on_cancel(self, now: Instant, *, keep: bool = True) -> list[Effect]:
        """The client wants no more: what there is stays, the status is `cancelled`. keep=False: nothing stays."""
        if self.ended:
            return []
        stop = self._stop_node()
        end = EndRecord(status="cancelled", completed_at=now.unix_s, usage=self._usage())
        return [*stop, *self._finish(end, keep=keep)]

    def on_reader_joined(self) -> None:
        self._readers += 1
        self._orphaned_at_s = None

    def on_reader_left(self, now: Instant) -> list[Effect]:
        """The last reader's leaving cancels, at once or (stored) after `orphan_grace_s`."""
        self._readers -= 1
        if self._readers > 0 or self.ended:
            return []
        if not self.record.request.store:
            return self.on_cancel(now)
        self._orphaned_at_s = now.mono_s
        return []

    def told(self) -> list[Event]:
        """The log as far as it was delivered."""
        return replay(self.record, self.deltas[: self._told], None) if self._opened else []

    # -- the clock -----------------------------------------------------------------------------

    def on_time(self, now: Instant) -> list[Effect]:
        """Call a few times a second: orphans end, and who waits for a node asks again."""
        if self.ended:
            return []
        if self._orphaned_at_s is not None and now.mono_s >= self._orphaned_at_s + self._orphan_grace_s:
            return self.on_cancel(now)
        return self.on_chance()

    def on_chance(self) -> list[Effect]:
        """There may be a node now that there was none before: who waits for one asks again, also those that refused."""
        if not self.homeless:
            return []
        self._refusing.clear()
        return [self._need()]

    # -- what is written -----------------------------------------------------------------------

    def on_written(self, outcome: Outcome) -> list[Effect]:
        """How the oldest outstanding `Write` went; what follows from its entry may be told now."""
        if self._over:
            return []
        entry = self._unwritten.popleft()
        match outcome:
            case "kept":
                return self._follow(entry)
            case "lost":
                return self._stop_here(_failure(ResponseMoved()))
            case "refused":
                return self._stop_here(_failure(unwritable()))

    def suspend(self, because: EdgechatError) -> list[Effect]:
        """Nothing more happens here: a stored response is left as it is written, for whoever goes on with it."""
        return [] if self._over else self._stop_here(_failure(because))

    def _put(self, entry: Entry) -> list[Effect]:
        if not self.record.request.store:
            return self._follow(entry)
        self._unwritten.append(entry)
        return [Write(entry)]

    def _follow(self, entry: Entry) -> list[Effect]:
        match entry:
            case Began():
                reading = [] if self._reading is None else [self._reading]
                return [*self._open(), *self._serving(), *reading]
            case Read():
                return []
            case Said(_, _, ids, deltas):
                self._told += len(ids)
                events = self.log.extend(deltas)
                return [Deliver(events)] if events else []
            case Ended() | Dropped():
                return self._close()

    def _open(self) -> list[Effect]:
        if self._opened:
            return []
        self._opened = True
        return [Deliver(self.log.open())]

    def _serving(self) -> list[Effect]:
        # An answer may be complete before its beginning is written.
        node = self._place.node if self.ended and self._place is not None else self.node
        return [Serving(node)] if self._opened and node is not None else []

    def _close(self) -> list[Effect]:
        assert self._end is not None
        self._over = True
        opened = self._open()
        response = StoredResponse(self.record, self.ids, self.deltas, self._end)
        return [*opened, Deliver(self.log.close(self._end)), Finished(response)]

    def _stop_here(self, failure: Failure) -> list[Effect]:
        stopped = self._stop_node()
        self.node, self.ended, self._over = None, True, True
        self._unwritten.clear()
        return [*stopped, Refused(failure)]

    # -- ends ----------------------------------------------------------------------------------

    def _stop_node(self) -> list[Effect]:
        return [] if self.node is None else [SendNode(self.node, Cancel(self.record.id, self.epoch))]

    def _usage(self) -> Usage:
        placed = self.placed
        return Usage(placed.input_tokens if placed else 0, placed.cached_tokens if placed else 0, len(self.ids))

    def _fail(self, failure: Failure, now: Instant) -> list[Effect]:
        return [*self._stop_node(), *self._finish_failed(failure, now)]

    def _finish_failed(self, failure: Failure, now: Instant) -> list[Effect]:
        return self._finish(EndRecord(status="failed", completed_at=now.unix_s, error=failure, usage=self._usage()))

    def _finish(self, end: EndRecord, *, keep: bool = True) -> list[Effect]:
        if not self._promised:
            # Cancelled before it was promised, and so before anybody knew its name: nobody is left to be told why.
            self.node = None
            return self._stop_here(end.error or _failure(Draining()))
        self.node, self.ended, self._end = None, True, end
        if keep:
            return self._put(Ended(StoredResponse(self.record, self.ids, self.deltas, end)))
        return self._put(Dropped(self.record.id))


def _failure(error: EdgechatError) -> Failure:
    return Failure(error.code, error.message, error.retryable, error.param or "")
