"""Passes over one row of logits that touch the whole vocabulary, each as few times and as narrow as possible.

Blocks of a row stand for it: their sums find where a running sum passes a number, their maxima find a
floor under the best k. Does not know what a row is sampled with.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from core.errors import ServiceError
from edge_node.engine.step import Logits

BLOCK = 512
"""Ids a block. Fewer: more blocks to add up; more: more ids to add up in the block that is drawn."""


def best_id(row: Logits) -> int:
    """The highest logit's id, the lowest among equals. Raises ServiceError for a NaN or +inf, and if all are -inf."""
    best = int(row.argmax())  # a NaN if there is one
    if not math.isfinite(row[best]):
        raise ServiceError("The model produced numbers that are no probabilities; report this with the node's log.")
    return best


def weights(row: Logits, best: np.float32, temperature: float = 1.0) -> Logits:
    """Probabilities up to a factor, that of `best` being exactly 1."""
    # -inf has weight 0, and so has what a tiny temperature pushes there: what is meant.
    with np.errstate(over="ignore", under="ignore"):
        scaled = row - best
        if temperature != 1:
            scaled *= np.float32(min(1.0 / temperature, 3.0e38))
        np.exp(scaled, out=scaled)
    return scaled


def block_sums(row: Logits) -> NDArray[np.float64]:
    """Running sums at the end of each block.

    A block is added up in float32, pairwise, which is off by some 1e-7 of its sum and many times as fast.
    """
    return running_sums(np.add.reduceat(row, _starts(row)))


def running_sums(row: Logits) -> NDArray[np.float64]:
    """What `cumsum` in float64 says. Converting first is four times as fast as letting it convert."""
    return row.astype(np.float64).cumsum()


def floor_of_best(row: Logits, count: int) -> np.float32:
    """A number that at least the `count` best logits reach, and in most rows few more do.

    Each of the highest `count` block maxima is a logit, so that the lowest of them has `count` at or above it.
    """
    if count >= len(row):
        return np.float32(-math.inf)
    tops = np.maximum.reduceat(row, _starts(row)) if count <= len(row) // BLOCK else row
    return np.float32(np.partition(tops, len(tops) - count)[len(tops) - count])


def descending(row: Logits, floor: float | np.float32) -> Logits:
    """The logits that reach the floor, best first."""
    reaching = row.take(np.flatnonzero(row >= floor))
    reaching.sort()
    return reaching[::-1]


def id_at_rank(row: Logits, ranked: Logits, rank: int) -> int:
    """The id whose logit is ranked[rank]; equals rank by id, lowest first. ranked: the best logits, best first."""
    value = ranked[rank]
    return int(np.flatnonzero(row == value)[rank - np.count_nonzero(ranked > value)])


def _starts(row: Logits) -> NDArray[np.intp]:
    return np.arange(0, len(row), BLOCK)
