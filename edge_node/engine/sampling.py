"""Choose the next id from one row of logits.

A row is sampled on its own and its uniform number depends on (seed, position) alone, so neither
batch, node nor restart shows. Library generators do not promise their streams; `uniform` is ours and
frozen by test vectors. Measured costs: docs/decisions/021-sampling.md.

Order: logit bias, penalties, mask; then the best, or: temperature, top-k, top-p over what top-k left, min-p.
Equal logits rank by id, lowest first. Does not know sequences or text.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from core.errors import ServiceError
from core.frames import Sampling
from edge_node.engine.penalties import History, adjusted
from edge_node.engine.rows import (
    BLOCK,
    best_id,
    block_sums,
    descending,
    floor_of_best,
    id_at_rank,
    running_sums,
    weights,
)
from edge_node.engine.step import Logits

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# How far below the best logit to look for the ids that top-p keeps, in units of the temperature.
# On SmolLM2 at top-p 0.95 the first suffices for 100 % of rows at temperature 0.7, 86 % at 1.
_DEPTHS = (8.0, 12.0, 16.0, math.inf)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits; position: index among the response's output ids.

    Two rounds of the SplitMix64 finaliser (Steele, Lea and Flood 2014), a counter hash: no state.
    """
    return (_mix(_mix(seed + _GOLDEN) + position * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(
    logits: Logits,
    sampling: Sampling,
    tokenizer_size: int,
    seed: int,
    position: int,
    history: History | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """An id below `tokenizer_size`, drawn as `sampling` says; a pure function of its arguments.

    logits [vocab] of float32, -inf for what cannot come; history: the ids so far, for penalties, which without it do
    not apply; allowed [tokenizer_size]: the ids that a grammar lets come next. Raises ServiceError if the logits hold
    a NaN or +inf, and if no possible id is allowed.
    """
    row = logits[:tokenizer_size]
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        if allowed is None:
            return _choose(adjusted(row, sampling, history), sampling, seed, position)
        best_id(row)  # a row that is broken where the mask hides it is broken nevertheless
        ids = np.flatnonzero(allowed[:tokenizer_size])
        left = adjusted(row, sampling, history).take(ids)
        if not len(ids) or left.max() == -math.inf:
            raise ServiceError("The format of this answer leaves no token that can come next; ask without the format.")
        return int(ids[_choose(left, sampling, seed, position)])


def _choose(row: Logits, sampling: Sampling, seed: int, position: int) -> int:
    """The index drawn from a row that already holds all that is done to logits."""
    best = best_id(row)
    if sampling.temperature <= 0:
        return best
    at = uniform(seed, position)
    if sampling.top_k <= 0 and sampling.top_p >= 1 and sampling.min_p <= 0:
        return _draw(weights(row, row[best], sampling.temperature), at)
    ranked = _kept(row, row[best], sampling)
    return id_at_rank(row, ranked, _passing(running_sums(weights(ranked, row[best], sampling.temperature)), at))


def _kept(row: Logits, best: np.float32, sampling: Sampling) -> Logits:
    """The logits that the filters keep, best first.

    Each filter keeps the first so many of the ranking, so all of them together keep the shortest of these. It is enough
    to rank the logits above a floor: of top-k, of min-p, or deep enough to hold the mass that top-p wants.
    """
    # min-p in logits: weight >= min_p of the best's weight, which is 1.
    lowest = (
        float(best) + sampling.temperature * math.log(min(sampling.min_p, 1.0)) if sampling.min_p > 0 else -math.inf
    )
    if sampling.top_k > 0:
        ranked = descending(row, floor_of_best(row, sampling.top_k))[: sampling.top_k]
        if sampling.top_p < 1:
            sums = running_sums(weights(ranked, best, sampling.temperature))
            ranked = ranked[: _reaching(sums, sampling.top_p * sums[-1])]
        return ranked[ranked >= lowest]
    if sampling.top_p >= 1:
        return descending(row, lowest)
    goal = sampling.top_p * float(weights(row, best, sampling.temperature).sum())
    for depth in _DEPTHS:
        floor = max(lowest, float(best) - depth * sampling.temperature)
        ranked = descending(row, floor)
        sums = running_sums(weights(ranked, best, sampling.temperature))
        if sums[-1] >= goal or floor == lowest:
            break
    return ranked[: _reaching(sums, goal)]


def _reaching(sums: NDArray[np.float64], goal: float) -> int:
    """How many it takes until their running sum reaches the goal; at least one, at most all."""
    return int(np.searchsorted(sums, goal)) + 1


def _draw(row: Logits, at: float) -> int:
    """The index at which the running sum of weights passes `at` of the total, first by block, then inside it."""
    sums = block_sums(row)
    block = _passing(sums, at)
    before = float(sums[block - 1]) if block else 0.0
    within = running_sums(row[block * BLOCK : (block + 1) * BLOCK])
    return block * BLOCK + _passing(within, (at * float(sums[-1]) - before) / float(within[-1]))


def _passing(sums: NDArray[np.float64], at: float) -> int:
    """The index at which running sums pass `at` of their last; never one that adds nothing, whatever the rounding."""
    passed = np.searchsorted(sums, at * sums[-1], side="right")
    return int(min(passed, np.searchsorted(sums, sums[-1])))
