"""Who runs, and what the next step computes.

One rule: each sequence's computed tokens catch up with its tokens. A step has at most one chunk (of the
sequence that was admitted first among those that still read) and one decode batch (of all that write).
Does not know sampling, speech or frames.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from edge_node.engine.costs import StepCosts
from edge_node.engine.ladder import LADDER, longest_within, next_stretch
from edge_node.engine.limits import EngineLimits
from edge_node.engine.sequence import Sequence
from edge_node.engine.slots import Slots
from edge_node.engine.step import Chunk, Decode, Logits, StepPlan, StepResult

# The id of padding and of dummy rows.
_FILLER = 0
_LEAST_STALL_S = 0.05


@dataclass(frozen=True, slots=True)
class Advanced:
    """A sequence that a step moved on; logits [vocab] if its last known position was computed."""

    sequence: Sequence
    logits: Logits | None


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """A plan that is being run, and whom its parts are for; writers ascend by slot."""

    plan: StepPlan
    reader: Sequence | None
    writers: list[Sequence]


class Scheduler:
    """Invariant: a running sequence holds exactly one slot, a waiting one none; at most one plan is outstanding."""

    def __init__(self, limits: EngineLimits, costs: StepCosts) -> None:
        self._limits = limits
        self._costs = costs
        self._slots = Slots(limits.slots)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by admission
        self._steps = 0
        self._outstanding: _Outstanding | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def has_room(self) -> bool:
        """Whether one more sequence may wait."""
        return len(self._waiting) < self._slots.free + self._limits.max_waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Its slot goes to nobody before the next plan, so a step under way does no harm."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._slots.release(sequence.slot)
        sequence.slot = None

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, None when idle. Raises RuntimeError while the previous plan is not committed."""
        if self._outstanding is not None:
            raise RuntimeError("The previous plan has not been committed.")
        self._admit(now_s)
        if not self._running:
            return None
        reader = next((sequence for sequence in self._running if sequence.reading), None)
        writers = sorted((s for s in self._running if not s.reading), key=_slot)
        chunk = None if reader is None else self._chunk(reader, _span(writers))
        decode = self._decode(writers, chunk) if writers else None
        self._steps += 1
        chunk_s = self._costs.chunk_s(len(chunk.ids)) if chunk else 0.0
        decode_s = self._costs.decode_s(len(decode.ids)) if decode else 0.0
        plan = StepPlan(self._steps, chunk, decode, chunk_s + decode_s)
        self._outstanding = _Outstanding(plan, reader, writers)
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
                    sequence.computed += 1
                    advanced.append(Advanced(sequence, logits_of.get(sequence.slot - plan.decode.first_slot)))
        if plan.chunk is not None and outstanding.reader is not None and outstanding.reader.slot is not None:
            reader = outstanding.reader
            reader.computed = min(plan.chunk.start + len(plan.chunk.ids), len(reader.prompt))
            advanced.append(Advanced(reader, next(iter(_rows(result.chunk_logits)), None)))
        return advanced

    def check_invariants(self) -> None:
        self._slots.check_invariants()
        held = sorted(_slot(sequence) for sequence in self._running)
        assert len(set(held)) == len(held) == self._slots.used, held
        assert all(sequence.slot is None for sequence in self._waiting)
        assert len(self._waiting) <= self._limits.slots + self._limits.max_waiting
        for sequence in (*self._running, *self._waiting):
            sequence.check_invariants()

    # -- the parts of a plan ----------------------------------------------------------------

    def _admit(self, now_s: float) -> None:
        while self._waiting and self._slots.free:
            sequence = self._waiting.popleft()
            sequence.slot = self._slots.allocate()
            sequence.admitted_s = now_s
            self._running.append(sequence)

    def _chunk(self, reader: Sequence, decode_rows: int) -> Chunk:
        prompt, most = reader.prompt, self._limits.chunk_tokens
        if decode_rows:
            most = longest_within(
                {step: self._costs.chunk_s(step) for step in LADDER}, self._stall_s(decode_rows), most
            )
        stretch = next_stretch(reader.computed, len(prompt), self._limits.context_tokens, most)
        ids = prompt[stretch.start : stretch.start + stretch.length]
        ends_prompt = stretch.start + stretch.length >= len(prompt)
        # The last position of the prompt is sampled from, unless its successor is already known.
        wanted = [len(ids) - 1] if ends_prompt and not reader.output else []
        return Chunk(_slot(reader), stretch.start, ids + [_FILLER] * (stretch.length - len(ids)), wanted)

    def _stall_s(self, decode_rows: int) -> float:
        if self._limits.max_stall_ms > 0:
            return self._limits.max_stall_ms / 1e3
        return max(_LEAST_STALL_S, 2 * self._costs.decode_s(decode_rows))

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
                ends[row] = min(chunk.start + len(chunk.ids), len(sequence.prompt)) + 1
            else:
                ends[row] = sequence.computed + 1
        wanted = [_slot(sequence) - lo for sequence in writers if sequence.wants_sample]
        return Decode(lo, ids, ends, wanted)


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _span(writers: list[Sequence]) -> int:
    return _slot(writers[-1]) + 1 - _slot(writers[0]) if writers else 0


def _rows(logits: Logits | None) -> list[Logits]:
    return [] if logits is None else list(logits)
