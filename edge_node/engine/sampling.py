"""Choose the next id from one row of logits.

A row is sampled on its own and its uniform number depends on (seed, position) alone, so neither
batch, node nor restart shows. Library generators do not promise their streams; `uniform` is ours and
frozen by test vectors. Measured costs: docs/decisions/021-sampling.md.

Order: temperature, top-k, then top-p over what top-k left. Equal logits rank by id, lowest first.
Does not know sequences or text.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from core.errors import ServiceError
from core.frames import Sampling
from edge_node.engine.step import Logits

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# How far below the best logit to look for the ids that top-k and top-p keep, in units of the
# temperature. On SmolLM2 at top-p 0.95 the first suffices for 100 % of rows at temperature 0.7, 86 % at 1.
_DEPTHS = (8.0, 16.0, math.inf)


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


def sample(logits: Logits, sampling: Sampling, tokenizer_size: int, seed: int, position: int) -> int:
    """An id below `tokenizer_size`; logits [vocab] of float32. Raises ServiceError if they hold a NaN or +inf."""
    row = logits[:tokenizer_size]
    best = int(row.argmax())  # the lowest id among equals; a NaN if there is one
    if not math.isfinite(row[best]):
        raise ServiceError("The model produced numbers that are no probabilities; report this with the node's log.")
    if sampling.temperature <= 0:
        return best
    weights = _weights(row, row[best], sampling.temperature)
    if sampling.top_k <= 0 and sampling.top_p >= 1:
        return _draw(weights, uniform(seed, position))
    kept = _ranked(weights, sampling)
    return int(kept[_draw(weights[kept], uniform(seed, position))])


def _weights(row: Logits, best: np.float32, temperature: float) -> Logits:
    """Probabilities up to a factor, the best being exactly 1."""
    scaled = row - best
    # A tiny temperature overflows to -inf, whose weight is 0: what is meant.
    with np.errstate(over="ignore", under="ignore"):
        scaled *= np.float32(min(1.0 / temperature, 3.0e38))
        np.exp(scaled, out=scaled)
    return scaled


def _ranked(weights: Logits, sampling: Sampling) -> NDArray[np.intp]:
    """Ids that top-k and top-p keep, best first, without sorting the vocabulary.

    The ids above a threshold are the first so many of the ranking. It is enough to rank those, once
    they are as many as top-k wants or carry the mass that top-p alone wants.
    """
    top_k, total = sampling.top_k, _mass(weights)
    kept = np.arange(0)
    for depth in _DEPTHS:
        kept = np.flatnonzero(weights >= math.exp(-depth))
        if len(kept) >= top_k if top_k > 0 else _mass(weights[kept]) >= sampling.top_p * total:
            break
    kept = kept[np.argsort(-weights[kept], kind="stable")]
    if top_k > 0:
        kept = kept[:top_k]
        total = _mass(weights[kept])
    if sampling.top_p < 1:
        sums = np.cumsum(weights[kept], dtype=np.float64)
        kept = kept[: int(np.searchsorted(sums, sampling.top_p * total)) + 1]
    return kept


def _mass(weights: Logits) -> float:
    return float(weights.sum(dtype=np.float64))


def _draw(weights: Logits, at: float) -> int:
    """The index at which the running sum passes `at` of the total; never one of weight 0."""
    sums = np.cumsum(weights, dtype=np.float64)
    passed = np.searchsorted(sums, at * sums[-1], side="right")
    return int(min(passed, np.searchsorted(sums, sums[-1])))
