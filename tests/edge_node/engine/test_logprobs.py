from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ServiceError
from edge_node.engine.logprobs import logprobs
from edge_node.engine.step import Logits


def plainly(row: Logits) -> list[float]:
    """Log-softmax in float64, by its definition."""
    exact = row.astype(np.float64) - float(row.max())
    with np.errstate(divide="ignore"):
        shares: list[float] = (exact - math.log(np.exp(exact).sum())).tolist()
    return shares


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 1500),
    width=st.sampled_from([0.01, 1.0, 8.0, 1e4]),
    most=st.integers(0, 25),
)
def test_they_are_the_log_softmax_and_the_best_come_first(seed: int, size: int, width: float, most: int) -> None:
    generator = np.random.default_rng(seed)
    row = (np.round(generator.standard_normal(size + 5) * 20) / 20 * width).astype(np.float32)  # ties
    row[generator.random(size + 5) < 0.2] = -math.inf
    row[generator.integers(size)] = 0
    exact = plainly(row[:size])
    token = int(generator.integers(size))
    chosen, top = logprobs(row, token, most, size)
    assert chosen == pytest.approx(exact[token], rel=1e-7, abs=1e-6)
    possible = [other for other in range(size) if exact[other] > -math.inf]
    expected = sorted(possible, key=lambda other: (-row[other], other))[:most]
    assert [other for other, _ in top] == expected
    assert [share for _, share in top] == pytest.approx([exact[other] for other in expected], rel=1e-7, abs=1e-6)


def test_over_the_whole_vocabulary_the_probabilities_sum_to_one() -> None:
    row = (np.random.default_rng(2).standard_normal(60_000) * 4).astype(np.float32)
    _, everything = logprobs(row, 0, 60_000, 50_000)
    assert len(everything) == 50_000, "padding has no probability"
    assert math.fsum(math.exp(share) for _, share in everything) == pytest.approx(1, abs=1e-6)


def test_equals_are_named_lowest_id_first() -> None:
    assert [token for token, _ in logprobs(np.array([1, 4, 4, 0, 4], np.float32), 0, 3, 5)[1]] == [1, 2, 4]


def test_an_impossible_id_has_no_probability_and_is_never_an_alternative() -> None:
    chosen, top = logprobs(np.array([-math.inf, 1, -math.inf], np.float32), 0, 20, 3)
    assert chosen == -math.inf
    assert top == [(1, 0.0)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_no_logits_are_refused(broken: float) -> None:
    with pytest.raises(ServiceError, match="no probabilities"):
        logprobs(np.array([0, broken], np.float32), 0, 1, 2)
