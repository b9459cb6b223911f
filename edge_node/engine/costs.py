"""What a step costs, learnt from the steps that were run.

Does not measure anything: seconds come with each StepResult.
"""

from __future__ import annotations

from bisect import bisect_left

from core.frames import Rates
from edge_node.engine.step import BLOCK_TOKENS, Chunk, StepPlan, StepResult

# Smooth enough to ignore one preempted step, quick enough to follow the machine.
_WEIGHT = 0.2
# Where a chunk's start tells as much about the cost of depth as its length does about its own.
_DEEP_TOKENS = 1024
# A bound that is to hold nearly always is that many usual errors away from the expectation.
_ERRORS = 4.0
_MOST_ERROR = 0.5
# Before anything is measured; slow on purpose, since a watchdog multiplies predictions.
_UNKNOWN_S_PER_TOKEN = 0.05
_UNKNOWN_COPY_S_PER_TOKEN = 0.001


class _Table:
    """Seconds by size, smoothed; sizes in between are interpolated, beyond them estimated from above."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, size: int, seconds: float) -> None:
        before = self._seconds.get(size)
        self._seconds[size] = seconds if before is None else before + _WEIGHT * (seconds - before)

    def estimate(self, size: int) -> float:
        """Never too low as long as cost grows with size, and no faster than in proportion.

        By that rule shorter ones bound longer ones as well: one preempted step of a length must not keep that length
        from ever being tried, and so measured, again.
        """
        if not self._seconds:
            return size * _UNKNOWN_S_PER_TOKEN
        in_proportion = [seconds * size / known for known, seconds in self._seconds.items() if known < size]
        return min([self._between(size), *in_proportion])

    def _between(self, size: int) -> float:
        known = sorted(self._seconds)
        at = bisect_left(known, size)
        if at == len(known):
            return self._seconds[known[-1]] * size / known[-1]
        above = known[at]
        if above == size or at == 0:
            return self._seconds[above]
        below = known[at - 1]
        share = (size - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def knows(self, size: int) -> bool:
        return size in self._seconds

    def best_rate(self) -> float:
        return max((size / seconds for size, seconds in self._seconds.items() if seconds > 0), default=0.0)


class StepCosts:
    """Predicts the seconds of chunks, verified drafts, decode batches and copies."""

    def __init__(self) -> None:
        self._chunks = _Table()
        self._verifies = _Table()
        self._decodes = _Table()
        self._copy_s_per_token: float | None = None
        self._s_per_pair = 0.0
        self._error = 0.0  # of a chunk's prediction, as a share of it
        self._last_rows = 0

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step that was run."""
        if plan.chunk is not None:
            self._observe_chunk(plan.chunk, result.chunk_s)
        if plan.decode is not None:
            self._last_rows = len(plan.decode.ids)
            self._decodes.observe(self._last_rows, result.decode_s)
        if copied := _copied_tokens(plan):
            before, now = self._copy_s_per_token, result.copy_s / copied
            self._copy_s_per_token = now if before is None else before + _WEIGHT * (now - before)

    def _observe_chunk(self, chunk: Chunk, seconds: float) -> None:
        """What was not expected is put down to the chunk's depth the more, the deeper it was, else to its length."""
        # Every wanted position costs a row of the vocabulary, so drafts are a case of their own.
        table, length = self._verifies if _verifies(chunk) else self._chunks, len(chunk.ids)
        pairs = length * chunk.start
        if table.knows(length):
            expected = table.estimate(length) + self._s_per_pair * pairs
            error = min(_MOST_ERROR, abs(seconds - expected) / expected) if expected > 0 else 0.0
            self._error += _WEIGHT * (error - self._error)
        if pairs and table.knows(length):
            share = chunk.start / (chunk.start + _DEEP_TOKENS)
            missed = seconds - table.estimate(length) - self._s_per_pair * pairs
            self._s_per_pair = max(0.0, self._s_per_pair + _WEIGHT * share * missed / pairs)
        table.observe(length, max(0.0, seconds - self._s_per_pair * pairs))

    def predict_s(self, plan: StepPlan) -> float:
        """How long the whole step should take."""
        seconds = self.copy_s(_copied_tokens(plan))
        if plan.chunk is not None:
            length, start = len(plan.chunk.ids), plan.chunk.start
            seconds += self.verify_s(length, start) if _verifies(plan.chunk) else self.chunk_s(length, start)
        return seconds + (self.decode_s(len(plan.decode.ids)) if plan.decode is not None else 0.0)

    def chunk_s(self, tokens: int, start: int = 0) -> float:
        """A chunk that begins at position `start`: each of its ids looks at all before it."""
        return self._chunks.estimate(tokens) + self._s_per_pair * tokens * start

    def sure_s(self, seconds: float) -> float:
        """What to plan a chunk for that must hardly ever take longer than that."""
        return seconds / (1 + _ERRORS * self._error)

    def verify_s(self, length: int, start: int = 0) -> float:
        """A chunk whose positions are all wanted."""
        return self._verifies.estimate(length) + self._s_per_pair * length * start

    def copy_s(self, tokens: int) -> float:
        known = self._copy_s_per_token
        return tokens * (_UNKNOWN_COPY_S_PER_TOKEN if known is None else known)

    def decode_s(self, rows: int) -> float:
        return self._decodes.estimate(rows)

    def rates(self) -> Rates:
        """Prefill: what a long prompt gets. Decode: what one stream gets, at the batch width seen last."""
        step_s = self.decode_s(self._last_rows) if self._last_rows else 0.0
        return Rates(self._chunks.best_rate(), 1.0 / step_s if step_s > 0 else 0.0)


def _verifies(chunk: Chunk) -> bool:
    return len(chunk.wanted) > 1


def _copied_tokens(plan: StepPlan) -> int:
    blocks = sum(len(load.blocks) for load in plan.loads) + sum(len(save.blocks) for save in plan.saves)
    return sum(move.tokens for move in plan.moves) + BLOCK_TOKENS * blocks
