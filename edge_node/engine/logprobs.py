"""How likely the model itself held an id, and which ids it held likeliest.

That is before bias, penalties, mask and temperature. Does not know how an id is chosen, nor what ids stand for.
"""

from __future__ import annotations

import math

import numpy as np

from edge_node.engine.rows import best_id, block_sums, floor_of_best, weights
from edge_node.engine.step import Logits


def logprobs(logits: Logits, token: int, most: int, tokenizer_size: int) -> tuple[float, list[tuple[int, float]]]:
    """The natural log of the token's probability, and up to `most` of the likeliest ids with theirs, best first.

    logits [vocab]; ids from `tokenizer_size` on are no part of the distribution. Equals rank by id, lowest first; ids
    of probability 0 are left out, and a token of probability 0 has -inf. Within 1e-6 of a log-softmax in float64: only
    the weights are float32, their sum and the logarithms are not. Raises ServiceError for a NaN or +inf.
    """
    row = logits[:tokenizer_size]
    best = row[best_id(row)]
    offset = float(best) + math.log(block_sums(weights(row, best))[-1])
    return float(row[token]) - offset, [(top, float(row[top]) - offset) for top in _likeliest(row, most)]


def _likeliest(row: Logits, most: int) -> list[int]:
    if most <= 0:
        return []
    ids = np.flatnonzero(row >= max(floor_of_best(row, most), np.finfo(np.float32).min))
    order = np.argsort(-row[ids], kind="stable")[:most]
    return [int(top) for top in ids[order]]
