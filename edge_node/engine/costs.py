"""What a step costs, learnt from the steps that were run.

Does not measure anything: seconds come with each StepResult.
"""

from __future__ import annotations

from bisect import bisect_left

from core.frames import Rates
from edge_node.engine.step import StepPlan, StepResult

# Smooth enough to ignore one preempted step, quick enough to follow a growing context.
_WEIGHT = 0.2
# Before anything is measured; slow on purpose, since a watchdog multiplies predictions.
_UNKNOWN_S_PER_TOKEN = 0.05


class _Table:
    """Seconds by size, smoothed; sizes in between are interpolated, beyond them estimated from above."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, size: int, seconds: float) -> None:
        before = self._seconds.get(size)
        self._seconds[size] = seconds if before is None else before + _WEIGHT * (seconds - before)

    def estimate(self, size: int) -> float:
        """Never too low as long as cost grows with size, and no faster than in proportion."""
        known = sorted(self._seconds)
        if not known:
            return size * _UNKNOWN_S_PER_TOKEN
        at = bisect_left(known, size)
        if at == len(known):
            return self._seconds[known[-1]] * size / known[-1]
        above = known[at]
        if above == size or at == 0:
            return self._seconds[above]
        below = known[at - 1]
        share = (size - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def best_rate(self) -> float:
        return max((size / seconds for size, seconds in self._seconds.items() if seconds > 0), default=0.0)


class StepCosts:
    """Predicts the seconds of chunks and decode batches."""

    def __init__(self) -> None:
        self._chunks = _Table()
        self._decodes = _Table()
        self._last_rows = 0

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step that was run."""
        if plan.chunk is not None:
            self._chunks.observe(len(plan.chunk.ids), result.chunk_s)
        if plan.decode is not None:
            self._last_rows = len(plan.decode.ids)
            self._decodes.observe(self._last_rows, result.decode_s)

    def chunk_s(self, tokens: int) -> float:
        return self._chunks.estimate(tokens)

    def decode_s(self, rows: int) -> float:
        return self._decodes.estimate(rows)

    def rates(self) -> Rates:
        """Prefill: what a long prompt gets. Decode: what one stream gets, at the batch width seen last."""
        step_s = self.decode_s(self._last_rows) if self._last_rows else 0.0
        return Rates(self._chunks.best_rate(), 1.0 / step_s if step_s > 0 else 0.0)
