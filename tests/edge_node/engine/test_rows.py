from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ServiceError
from edge_node.engine.rows import BLOCK, best_id, block_sums, descending, floor_of_best, id_at_rank, weights
from edge_node.engine.step import Logits


@st.composite
def rows(draw: st.DrawFn) -> Logits:
    """A few blocks of coarse numbers, so that there are ties, and some impossible ids."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, 5 * BLOCK))
    row = np.round(generator.standard_normal(size) * draw(st.sampled_from([0.5, 3.0, 1e30]))).astype(np.float32)
    row[generator.random(size) < 0.1] = -math.inf
    return row


@given(rows(), st.integers(1, 6 * BLOCK))
def test_the_best_so_many_reach_the_floor(row: Logits, count: int) -> None:
    floor = floor_of_best(row, count)
    assert (row >= floor).sum() >= min(count, len(row))
    ranked = descending(row, floor)
    assert ranked[:count].tolist() == sorted(row.tolist(), reverse=True)[:count]


def test_few_more_than_the_best_reach_their_floor() -> None:
    row = np.random.default_rng(3).standard_normal(200_000).astype(np.float32)
    assert len(descending(row, floor_of_best(row, 40))) < 60


@given(rows())
def test_a_rank_is_an_id_and_equals_rank_by_id(row: Logits) -> None:
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    ranked = descending(row, -math.inf)
    for rank in {0, len(row) // 3, len(row) - 1}:
        assert id_at_rank(row, ranked, rank) == order[rank]


@given(st.integers(1, 5 * BLOCK), st.integers(0, 2**32))
def test_sums_of_blocks_are_the_running_sum_at_their_ends(size: int, seed: int) -> None:
    row = np.random.default_rng(seed).random(size).astype(np.float32)
    ends = [min(start + BLOCK, size) for start in range(0, size, BLOCK)]
    exact = np.cumsum(row, dtype=np.float64)[np.array(ends) - 1]
    assert block_sums(row) == pytest.approx(exact, rel=1e-6)


def test_the_best_weighs_one_and_the_impossible_nothing() -> None:
    row = np.array([-math.inf, 3, 2, -3e38], np.float32)
    assert weights(row, row[1], 0.5).tolist() == [0, 1, pytest.approx(math.exp(-2)), 0]


@pytest.mark.parametrize("broken", [[0, math.nan, 1], [0, math.inf, 1], [-math.inf, -math.inf]])
def test_a_row_with_no_best_is_refused(broken: list[float]) -> None:
    with pytest.raises(ServiceError, match="no probabilities"):
        best_id(np.array(broken, np.float32))
