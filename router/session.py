"""The session: the state machine of one response, from dispatch to its terminal event.

    waiting --assign(node)--> streaming --Done/Failed/cancel/lost--> ended
       ^                          |
       +---- node lost, epoch+1 --+

A response is promised when a node has first said anything about it: until then a refusal (too long, no room, no node)
is an error and no response, whatever the client speaks.

Events and an `Instant` go in, effects come out; the caller carries them out in order. Does not know
sockets, the store, how a node is chosen or what clients speak (`router/api` translates the events).

Fencing: every frame names its epoch; frames of another epoch, or after the end, are dropped and counted.
Order: a row's `seq` must be the number of ids already taken; ids seen before are dropped, a gap is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from core.conversation import Item
from core.errors import DeadlineExceeded, EdgechatError, NodeLost, NoNodeAvailable
from core.frames import Cancel, Delta, Done, Failed, Generate, Progress, Row, Started, Usage
from core.stream import EndRecord, Event, Failure, RequestRecord, StreamLog
from router import terms
from router.errors import Draining

MAX_DISPATCHES = 3
NOT_HERE = frozenset({"overloaded", "draining", "model_not_found"})
"""Why a node sends a stream elsewhere before it has done anything for it."""


class Instant(NamedTuple):
    """Both clocks at once: `mono_s` for durations (never jumps), `unix_s` for what people read."""

    mono_s: float
    unix_s: int


# -- effects -----------------------------------------------------------------------------------


class SendNode(msgspec.Struct, frozen=True):
    """Send a frame over the link of `node`."""

    node: str
    frame: Generate | Cancel


class NeedNode(msgspec.Struct, frozen=True):
    """Choose a node that serves `release`, none of `exclude`; answer with `assign`."""

    release: str
    exclude: frozenset[str]


class Deliver(msgspec.Struct, frozen=True):
    """Client events for every reader, in order."""

    events: list[Event]


class Serving(msgspec.Struct, frozen=True):
    """From now on `node` answers (the `edgechat:node` extension)."""

    node: str


class Reading(msgspec.Struct, frozen=True):
    """The node has read `computed` of `total` prompt tokens (the `edgechat:progress` extension)."""

    computed: int
    total: int


class Finished(msgspec.Struct, frozen=True):
    """The session is over; keep it if the request said `store`, then forget the session."""

    record: RequestRecord
    ids: list[int]
    deltas: list[list[Delta]]
    end: EndRecord


class Refused(msgspec.Struct, frozen=True):
    """The session is over before anything was promised: there is an error, and no response to keep."""

    failure: Failure


Effect: TypeAlias = SendNode | NeedNode | Deliver | Serving | Reading | Finished | Refused
NodeFrame: TypeAlias = Started | Progress | Row | Done | Failed


class Session:
    """Invariants: at most one node is responsible at a time, under the current `epoch`; every id in
    `ids` has been turned into events exactly once; exactly one `Finished` or `Refused` is ever returned, last.

    items: the whole conversation to be rendered, instructions and history included.
    prefix_keys: `core.conversation.prefix_keys` of them.
    orphan_grace_s: how long a stored response goes on without a reader.
    name_of: what people call a node; its key here is its address, which is not for clients.
    """

    def __init__(
        self,
        record: RequestRecord,
        items: list[Item],
        *,
        cache_salt: str,
        orphan_grace_s: float,
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
        self.dropped_frames = 0
        self.input_tokens = 0
        self.cached_tokens = 0
        self.dropped_items = 0
        self._cache_salt = cache_salt
        self._orphan_grace_s = orphan_grace_s
        self._name_of = name_of
        self._excluded: set[str] = set()
        self._moved_because: Failure | None = None
        self.ended = False
        self._opened = False
        self._arrived_at_s = 0.0
        self._readers = 1
        self._orphaned_at_s: float | None = None

    @property
    def wake_at_s(self) -> float | None:
        """When (monotonic) `on_time` must be called, or None."""
        if self.ended or self._orphaned_at_s is None:
            return None
        return self._orphaned_at_s + self._orphan_grace_s

    # -- dispatch ------------------------------------------------------------------------------

    def start(self, node: str, now: Instant, arrived_at_s: float) -> list[Effect]:
        """Begin on a node; its first word opens the log. arrived_at_s: from when (monotonic) the deadline counts."""
        self._arrived_at_s = arrived_at_s
        return self.assign(node, now)

    def warm_up(self, now: Instant) -> list[Effect]:
        """Answer with nothing, without a node: the id can be continued from."""
        self._opened = True
        end = EndRecord(status="completed", completed_at=now.unix_s, usage=Usage(0, 0, 0))
        return [Deliver(self.log.open()), *self._end(end)]

    def assign(self, node: str | None, now: Instant) -> list[Effect]:
        """The answer to `NeedNode`; None = there is none, which ends the response retryably."""
        if self.ended:
            return []
        if node is None:
            return self._fail(self._moved_because or _failure(NoNodeAvailable(self.record.request.model)), now)
        left_s = self._time_left_s(now)
        if left_s is not None and left_s <= 0:
            return self._fail(_failure(DeadlineExceeded(self.record.request.deadline_s)), now)
        self.node = node
        self.epoch += 1
        return [SendNode(node, self._generate(left_s or 0.0)), *([Serving(node)] if self._opened else [])]

    def on_node_lost(self, node: str, now: Instant) -> list[Effect]:
        """The link of `node` broke or its engine died under this stream: another node continues by ids."""
        if self.ended or node != self.node:
            return []
        return self._move(node, _failure(NodeLost(self._name_of(node))), now)

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
        elsewhere = NeedNode(self.record.release, frozenset({*self._excluded, node}))
        if self.epoch >= MAX_DISPATCHES or not able(elsewhere):
            return []
        return [*self._stop_node(), *self.on_node_lost(node, now)]

    def _move(self, node: str, because: Failure, now: Instant) -> list[Effect]:
        self.node = None
        self._moved_because = because
        self._excluded.add(node)
        if self.epoch >= MAX_DISPATCHES:
            return self._fail(because, now)
        return [NeedNode(self.record.release, frozenset(self._excluded))]

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
            max_output_tokens=request.max_output_tokens,
            tools=terms.offered_tools(request),
            format=terms.answer_format(request),
            effort=terms.effort(request),
            truncation=request.truncation,
            dropped_items=self.dropped_items,
            priority=terms.priority(request),
            cache_salt=self._cache_salt,
            prefix_keys=list(self.prefix_keys),
            deadline_s=deadline_s,
            exact=request.exact,
        )

    # -- what the node says --------------------------------------------------------------------

    def on_frame(self, node: str, frame: NodeFrame, now: Instant) -> list[Effect]:
        """A frame about this stream from `node`."""
        if self.ended or node != self.node or frame.epoch != self.epoch:
            self.dropped_frames += 1
            return []
        if isinstance(frame, Failed):
            return self._on_failed(node, frame, now)
        return [*self._open(node), *self._on_word(frame, now)]

    def _open(self, node: str) -> list[Effect]:
        if self._opened:
            return []
        self._opened = True
        return [Deliver(self.log.open()), Serving(node)]

    def _on_word(self, frame: Started | Progress | Row | Done, now: Instant) -> list[Effect]:
        match frame:
            case Started():
                self.input_tokens, self.cached_tokens = frame.input_tokens, frame.cached_tokens
                # Later epochs must cut the conversation where the first did, or the ids would not fit the prompt.
                self.dropped_items = frame.dropped_items
                return []
            case Progress():
                return [Reading(frame.computed, frame.total)]
            case Row():
                return self._on_row(frame, now)
            case Done():
                return self._on_done(frame, now)

    def _on_row(self, row: Row, now: Instant) -> list[Effect]:
        known = len(self.ids) - row.seq
        if known < 0 or len(row.ids) != len(row.deltas):
            name = self._name_of(self.node or "")
            gap = EdgechatError(f"The node {name!r} skipped output ids; send the request again.")
            return self._fail(_failure(gap), now)
        ids, deltas = row.ids[known:], row.deltas[known:]
        if not ids:
            return []
        self.ids.extend(ids)
        self.deltas.extend(deltas)
        events = self.log.extend(deltas)
        return [Deliver(events)] if events else []

    def _on_done(self, done: Done, now: Instant) -> list[Effect]:
        match done.finish:
            case "stop":
                end = EndRecord(status="completed", completed_at=now.unix_s, usage=done.usage)
            case "length":
                reason = "max_output_tokens"
                end = EndRecord(status="incomplete", completed_at=now.unix_s, reason=reason, usage=done.usage)
            case "cancelled":
                end = EndRecord(status="cancelled", completed_at=now.unix_s, usage=done.usage)
        return self._end(end)

    def _on_failed(self, node: str, failed: Failed, now: Instant) -> list[Effect]:
        if failed.retryable and failed.code == "engine_lost":
            return self.on_node_lost(node, now)
        if failed.code == DeadlineExceeded.code:
            # A node that went on with the answer knows only the rest of its time.
            return self._end_failed(_failure(DeadlineExceeded(self.record.request.deadline_s)), now)
        failure = Failure(failed.code, failed.message, failed.retryable, failed.param)
        if failed.retryable and failed.code in NOT_HERE:
            return self._move(node, failure, now)
        return self._end_failed(failure, now)

    # -- what the client does ------------------------------------------------------------------

    def on_cancel(self, now: Instant) -> list[Effect]:
        """The client wants no more: what there is stays, the status is `cancelled`."""
        if self.ended:
            return []
        stop = self._stop_node()
        return [*stop, *self._end(EndRecord(status="cancelled", completed_at=now.unix_s, usage=self._usage()))]

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

    def on_time(self, now: Instant) -> list[Effect]:
        """Call when `wake_at_s` has come."""
        wake_at_s = self.wake_at_s
        if wake_at_s is None or now.mono_s < wake_at_s:
            return []
        return self.on_cancel(now)

    # -- ends ----------------------------------------------------------------------------------

    def _stop_node(self) -> list[Effect]:
        return [] if self.node is None else [SendNode(self.node, Cancel(self.record.id, self.epoch))]

    def _usage(self) -> Usage:
        return Usage(self.input_tokens, self.cached_tokens, len(self.ids))

    def _fail(self, failure: Failure, now: Instant) -> list[Effect]:
        return [*self._stop_node(), *self._end_failed(failure, now)]

    def _end_failed(self, failure: Failure, now: Instant) -> list[Effect]:
        return self._end(EndRecord(status="failed", completed_at=now.unix_s, error=failure, usage=self._usage()))

    def _end(self, end: EndRecord) -> list[Effect]:
        self.node = None
        self.ended = True
        if not self._opened:
            # Cancelled before it was promised: only the clients of a router that shuts down still hear it.
            return [Refused(end.error or _failure(Draining()))]
        events = self.log.close(end)
        return [Deliver(events), Finished(self.record, self.ids, self.deltas, end)]


def _failure(error: EdgechatError) -> Failure:
    return Failure(error.code, error.message, error.retryable, error.param or "")
