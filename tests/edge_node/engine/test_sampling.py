from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from core.errors import ServiceError
from core.frames import Sampling
from edge_node.engine.sampling import sample, uniform
from edge_node.engine.step import Logits

VECTORS = [
    (0, 0, 0.28176129772258496),
    (0, 1, 0.6524484863740322),
    (1, 0, 0.8628561488610587),
    (42, 7, 0.19535155971618223),
    (9223372036854775813, 100000, 0.1734680094541301),
    (-1, 3, 0.510562089893682),
]


def row(*logits: float) -> Logits:
    return np.array(logits, np.float32)


def shares(logits: Logits, sampling: Sampling, draws: int = 4000) -> dict[int, float]:
    """How often each id is chosen, over positions of one seed."""
    counts = Counter(sample(logits, sampling, len(logits), 11, position) for position in range(draws))
    return {token: count / draws for token, count in sorted(counts.items())}


def plain_choice(logits: Logits, sampling: Sampling, size: int, seed: int, position: int) -> int:
    """The definition in the module's docstring, with a full sort: top-k, then top-p over what is left."""
    weights = np.exp((logits[:size] - logits[:size].max()) * np.float32(1 / sampling.temperature))
    ranked = sorted(range(size), key=lambda token: (-weights[token], token))
    ranked = ranked[: sampling.top_k or size]
    if sampling.top_p < 1:
        goal = sampling.top_p * sum(float(weights[token]) for token in ranked)
        mass, kept = 0.0, []
        for token in ranked:
            kept.append(token)
            mass += float(weights[token])
            if mass >= goal:
                break
        ranked = kept
    elif not sampling.top_k:
        ranked = list(range(size))
    at = uniform(seed, position) * sum(float(weights[token]) for token in ranked)
    mass = 0.0
    for token in ranked:
        mass += float(weights[token])
        if mass > at:
            return token
    raise AssertionError("the sum never passed the number drawn")


@pytest.mark.parametrize(("seed", "position", "number"), VECTORS)
def test_the_uniform_numbers_never_change(seed: int, position: int, number: float) -> None:
    assert uniform(seed, position) == number


def test_the_uniform_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(1, n) for n in range(20_000)], [uniform(n, 1) for n in range(20_000)]):
        counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
        chi_squared = float((((counts - 400) ** 2) / 400).sum())
        assert chi_squared < 90, "49 degrees of freedom exceed 90 less than once in 3,000"
        neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
        assert abs(neighbours) < 0.03


def test_greedy_takes_the_best_and_the_lowest_id_among_equals() -> None:
    assert sample(row(1, 5, 5, 2), Sampling(0.0), 4, 1, 0) == 1


def test_padding_ids_are_never_chosen() -> None:
    logits = row(0, 1, 99, 99)
    assert sample(logits, Sampling(0.0), 2, 1, 0) == 1
    assert {sample(logits, Sampling(1.0), 2, 1, position) for position in range(100)} == {0, 1}


def test_temperature_draws_each_id_as_often_as_its_probability_says() -> None:
    logits = row(0, 1, 2, 3)
    expected = np.exp([0, 0.5, 1, 1.5]) / np.exp([0, 0.5, 1, 1.5]).sum()
    drawn = shares(logits, Sampling(2.0))
    assert [drawn[token] for token in range(4)] == pytest.approx(list(expected), abs=0.03)


def test_a_temperature_near_zero_is_greedy() -> None:
    assert shares(row(1, 1.5, 1.2), Sampling(1e-42), 50) == {1: 1.0}


def test_top_k_keeps_the_best_with_the_lowest_ids_first() -> None:
    assert set(shares(row(1, 2, 2, 2, 0), Sampling(1.0, 1.0, 2), 200)) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_holds_the_mass() -> None:
    logits = row(*np.log([0.5, 0.3, 0.15, 0.05]))
    assert set(shares(logits, Sampling(1.0, 0.7), 300)) == {0, 1}
    assert set(shares(logits, Sampling(1.0, 0.85), 300)) == {0, 1, 2}
    assert set(shares(logits, Sampling(1.0, 0.0001), 50)) == {0}


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = row(*np.log([0.4, 0.3, 0.2, 0.1]))
    assert set(shares(logits, Sampling(1.0, 0.55, 2), 300)) == {0}, "0.4 of 0.7 is 57 %"


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 0.9), Sampling(0.6, 1.0, 30), Sampling(1.5, 0.8, 500), Sampling(0.9)]
)
def test_shortcuts_choose_what_a_full_sort_chooses(sampling: Sampling) -> None:
    generator = np.random.default_rng(5)
    for position in range(25):
        logits = (generator.standard_normal(900) * generator.choice([0.1, 1.0, 4.0])).astype(np.float32)
        logits[:50] = logits[50]  # ties
        assert sample(logits, sampling, 880, 3, position) == plain_choice(logits, sampling, 880, 3, position)


def test_a_row_of_impossible_ids_but_one_gives_that_one() -> None:
    logits = row(-math.inf, 3, -math.inf)
    for sampling in (Sampling(0.0), Sampling(1.0), Sampling(1.0, 0.5), Sampling(1.0, 1.0, 3)):
        assert {sample(logits, sampling, 3, 9, position) for position in range(20)} == {1}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_no_logits_are_refused(broken: float) -> None:
    with pytest.raises(ServiceError, match="no probabilities"):
        sample(row(0, broken, 1), Sampling(1.0), 3, 1, 0)


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = row(0, 1, 2)
    sample(logits, Sampling(0.5, 0.9, 2), 3, 1, 0)
    assert logits.tolist() == [0, 1, 2]
