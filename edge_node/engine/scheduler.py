"""Who runs, and what the next step computes.

One rule: each sequence's computed tokens catch up with its tokens. A step has at most one chunk (of the
sequence that goes first among those that read) and one decode batch (of all that write). Higher priority
goes first, then earlier arrival; for a higher priority a slot is taken away, and what it held is computed again.
When nobody wants an answer, one sequence may be re-read for the prefix store alone; anybody else comes before it.
Does not know sampling, speech or frames.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

from edge_node.engine.costs import StepCosts
from edge_node.engine.ladder import LADDER, VERIFIED_LENGTHS, longest_within, next_stretch
from edge_node.engine.limits import EngineLimits
from edge_node.engine.prefix_store import PrefixStore
from edge_node.engine.sequence import Sequence
from edge_node.engine.slots import Slots
from edge_node.engine.step import BLOCK_TOKENS, Chunk, Decode, Load, Logits, Move, Save, StepPlan, StepResult

# The id of padding and of dummy rows.
_FILLER = 0
_LEAST_STALL_S = 0.05
_RANK = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Advanced:
    """A sequence that a step moved on.

    logits [n, vocab]: after its last known id, if that was computed, and after each id of `draft`; those
    behind a draft's id count only if that id is what was sampled before it.
    """

    sequence: Sequence
    logits: list[Logits]
    draft: list[int]


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """A plan that is being run, and whom its parts are for; writers ascend by slot."""

    plan: StepPlan
    reader: Sequence | None
    writers: list[Sequence]
    drafter: Sequence | None


class Scheduler:
    """Invariant: a running sequence holds exactly one slot, a waiting one none; at most one plan is outstanding."""

    def __init__(self, limits: EngineLimits, costs: StepCosts, store: PrefixStore) -> None:
        self._limits = limits
        self._costs = costs
        self._store = store
        self._slots = Slots(limits.slots)
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []
        self._rereading: Sequence | None = None
        self._arrivals = 0
        self._steps = 0
        self._outstanding: _Outstanding | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def yielding(self) -> int:
        """How many of those that run or wait have a priority below the usual 0."""
        return sum(sequence.priority < 0 for sequence in (*self._running, *self._waiting))

    @property
    def rereading(self) -> bool:
        return self._rereading is not None

    def has_room(self) -> bool:
        """Whether one more sequence may wait."""
        free = self._limits.slots - len(self._running)
        return len(self._waiting) < free + self._limits.max_waiting

    def last_in_line(self, below: int) -> Sequence | None:
        """The last of those that wait, if its priority is lower and nothing was ever done for it."""
        untouched = [sequence for sequence in self._waiting if sequence.admitted_s is None]
        return untouched[-1] if untouched and untouched[-1].priority < below else None

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.number = self._arrivals
        insort(self._waiting, sequence, key=_RANK)

    def reread(self, sequence: Sequence) -> None:
        """Read a prompt that nobody waits for, so that its blocks are there when somebody does.

        Call only when `plan` has said that there is nothing to do; it is given up as soon as its slot is needed.
        """
        assert self._rereading is None
        self._rereading = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Its slot goes to nobody before the next plan, so a step under way does no harm."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._vacate(sequence)

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, None when idle. Raises RuntimeError while the previous plan is not committed."""
        if self._outstanding is not None:
            raise RuntimeError("The previous plan has not been committed.")
        self._admit(now_s)
        reader = min((sequence for sequence in self._running if sequence.reading), key=_RANK, default=None)
        if not self._running:
            reader = self._rereading
        writers = sorted((s for s in self._running if not s.reading), key=_slot)
        if reader is None and not writers:
            return None
        moves = self._compact(writers)
        loads = [] if reader is None else self._load(reader)
        drafter, chunk = self._draft(writers) if reader is None else (None, None)
        if reader is not None:
            chunk = self._chunk(reader, _span(writers))
        decode = self._decode(writers, chunk) if writers and drafter is None else None
        saves = [] if reader is None or chunk is None else self._saves(reader, chunk)
        self._steps += 1
        plan = StepPlan(self._steps, chunk, decode, 0.0, moves, loads, saves)
        plan = replace(plan, predicted_s=self._costs.predict_s(plan))
        self._outstanding = _Outstanding(plan, reader, [] if drafter else writers, drafter)
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Advanced]:
        """Count what was computed; sequences that ended while the step ran are left out."""
        outstanding = self._outstanding
        if outstanding is None or outstanding.plan is not plan:
            raise RuntimeError(f"Step {plan.number} is not the plan that is being run.")
        self._outstanding = None
        advanced: list[Advanced] = []
        if plan.decode is not None:
            logits_of = dict(zip(plan.decode.wanted, _rows(result.decode_logits), strict=True))
            for sequence in outstanding.writers:
                if sequence.slot is not None:
                    row = sequence.slot - plan.decode.first_slot
                    sequence.written()
                    advanced.append(Advanced(sequence, [logits_of[row]] if row in logits_of else [], []))
        if plan.chunk is not None:
            advanced += self._commit_chunk(outstanding, plan.chunk, _rows(result.chunk_logits))
        return advanced

    def check_invariants(self) -> None:
        self._slots.check_invariants()
        self._store.check_invariants()
        seated = [*self._running, *([self._rereading] if self._rereading and self._rereading.slot is not None else [])]
        held = sorted(_slot(sequence) for sequence in seated)
        assert len(set(held)) == len(held) == self._slots.used, held
        # Above all that write, so that no dummy row of theirs lands in it.
        assert self._rereading is None or self._rereading.slot in (None, self._slots.capacity - 1)
        assert all(sequence.slot is None for sequence in self._waiting)
        assert self._waiting == sorted(self._waiting, key=_RANK)
        assert len(self._waiting) <= self._limits.slots + self._limits.max_waiting
        for sequence in (*seated, *self._waiting):
            sequence.check_invariants()

    # -- who has a slot ---------------------------------------------------------------------

    def _admit(self, now_s: float) -> None:
        """Seat those who go first, as long as there is a slot or somebody of lower priority to take one from."""
        while self._waiting and (slot := self._slot_for(self._waiting[0])) is not None:
            sequence = self._waiting.pop(0)
            self._running.append(sequence)
            sequence.seat(slot, now_s)
        rereading = self._rereading
        if not self._running and rereading is not None and rereading.slot is None:
            slot = self._slots.allocate(highest=True)
            assert slot is not None
            rereading.seat(slot, now_s)

    def _slot_for(self, sequence: Sequence) -> int | None:
        slot = self._slots.allocate()
        if slot is None and self._rereading is not None and self._rereading.slot is not None:
            self._vacate(self._rereading)
            self._rereading = None
            slot = self._slots.allocate()
        if slot is None and (victim := self._victim(sequence.priority)) is not None:
            self._running.remove(victim)
            self._vacate(victim)
            insort(self._waiting, victim, key=_RANK)
            slot = self._slots.allocate()
        return slot

    def _victim(self, priority: int) -> Sequence | None:
        """Who gives way to `priority`: the lowest, of these one that has not just been there, and has least to lose."""
        lower = [sequence for sequence in self._running if sequence.priority < priority]
        return min(lower, key=lambda one: (one.priority, one.recovering, one.computed, -one.number), default=None)

    def _vacate(self, sequence: Sequence) -> None:
        self._slots.release(_slot(sequence))
        sequence.unseat()

    def _compact(self, writers: list[Sequence]) -> list[Move]:
        """Move the last writer into a free slot below it, when the shorter batch will make up for the copy.

        A sequence is taken to go on for as long as it has gone on.
        """
        hole = self._slots.lowest_free
        if hole is None or len(writers) < 2 or hole > _slot(writers[-1]):
            return []
        last, others = writers[-1], [_slot(writer) for writer in writers[:-1]]
        after = max(*others, hole) + 1 - min(*others, hole)
        saved_s = self._costs.decode_s(_span(writers)) - self._costs.decode_s(after)
        steps = min(len(last.output), last.limit_tokens - last.tokens)
        if saved_s * steps <= self._costs.copy_s(last.computed):
            return []
        source, target = _slot(last), self._slots.allocate()
        assert target is not None
        self._slots.release(source)
        last.slot = target
        writers.sort(key=_slot)
        return [Move(source, target, last.computed)]

    # -- the parts of a plan ----------------------------------------------------------------

    def _load(self, reader: Sequence) -> list[Load]:
        """Copy what the store holds of it by now, somebody else's reading since the last chunk included."""
        blocks = self._store.match(reader.keys)
        return [Load(_slot(reader), blocks)] if reader.hit(len(blocks)) else []

    def _chunk(self, reader: Sequence, decode_rows: int) -> Chunk:
        to_read, most = reader.to_read, self._limits.chunk_tokens
        if decode_rows or reader is self._rereading:
            costs = {step: self._costs.chunk_s(step, reader.computed) for step in LADDER}
            most = longest_within(costs, self._stall_s(decode_rows), most)
        stretch = next_stretch(reader.computed, len(to_read), self._limits.context_tokens, most)
        ids = to_read[stretch.start : stretch.start + stretch.length]
        is_last = stretch.start + stretch.length >= len(to_read)
        # The last position is sampled from, unless its successor is already known.
        samples = is_last and reader.ends_read and reader is not self._rereading
        wanted = [len(ids) - 1] if samples else []
        return Chunk(_slot(reader), stretch.start, ids + [_FILLER] * (stretch.length - len(ids)), wanted)

    def _stall_s(self, decode_rows: int) -> float:
        """How long the chunk of this step should be expected to take."""
        if self._limits.max_stall_ms > 0:
            return self._costs.sure_s(self._limits.max_stall_ms / 1e3)
        return self._costs.sure_s(max(_LEAST_STALL_S, 2 * self._costs.decode_s(decode_rows) if decode_rows else 0.0))

    def _saves(self, reader: Sequence, chunk: Chunk) -> list[Save]:
        """Keep the whole blocks to read that the slot holds after the chunk, as far as they are not kept yet."""
        first, blocks = self._store.insert(reader.keys[: (chunk.start + len(chunk.ids)) // BLOCK_TOKENS])
        return [Save(chunk.slot, first, blocks)] if blocks else []

    def _draft(self, writers: list[Sequence]) -> tuple[Sequence | None, Chunk | None]:
        """Several ids of a lone writer at once, when that promises to be faster than one after another."""
        if not self._limits.speculation or len(writers) != 1:
            return None, None
        writer = writers[0]
        if writer.speculator is None or not writer.wants_sample:
            return None, None
        room = writer.limit_tokens - writer.tokens
        lengths = [length for length in VERIFIED_LENGTHS if length <= room]
        verify_s = partial(self._costs.verify_s, start=writer.computed)
        draft = writer.speculator.draft(lengths, self._costs.decode_s(1), verify_s)
        if not draft:
            return None, None
        ids = [writer.next_id, *draft]
        return writer, Chunk(_slot(writer), writer.computed, ids, list(range(len(ids))))

    def _decode(self, writers: list[Sequence], chunk: Chunk | None) -> Decode:
        """Rows for every slot between the first and the last writer, dummies where nobody writes.

        A dummy lands on the first position that its slot's owner has yet to compute, this step's
        chunk counted; in a free slot that is position 0.
        """
        lo, hi = _slot(writers[0]), _slot(writers[-1]) + 1
        ids, ends = [_FILLER] * (hi - lo), [1] * (hi - lo)
        for sequence in self._running:
            row = _slot(sequence) - lo
            if not 0 <= row < hi - lo:
                continue
            if not sequence.reading:
                ids[row], ends[row] = sequence.next_id, sequence.computed + 1
            elif chunk is not None and chunk.slot == sequence.slot:
                ends[row] = min(chunk.start + len(chunk.ids), len(sequence.to_read)) + 1
            else:
                ends[row] = sequence.computed + 1
        wanted = [_slot(sequence) - lo for sequence in writers if sequence.wants_sample]
        return Decode(lo, ids, ends, wanted)

    def _commit_chunk(self, outstanding: _Outstanding, chunk: Chunk, rows: list[Logits]) -> list[Advanced]:
        drafter, reader = outstanding.drafter, outstanding.reader
        if drafter is not None and drafter.slot is not None:
            drafter.written()
            return [Advanced(drafter, rows, chunk.ids[1:])]
        if reader is None or reader.slot is None:
            return []
        reader.read_to(chunk.start + len(chunk.ids))
        if reader is not self._rereading:
            return [Advanced(reader, rows, [])]
        if not reader.reading:
            self._vacate(reader)
            self._rereading = None
        return []


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _span(writers: list[Sequence]) -> int:
    return _slot(writers[-1]) + 1 - _slot(writers[0]) if writers else 0


def _rows(logits: Logits | None) -> list[Logits]:
    return [] if logits is None else list(logits)
