from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ServiceError
from core.frames import Sampling
from edge_node.engine.penalties import History
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
    """The definition in the module's docstring, with a full sort: top-k, top-p over what is left, min-p."""
    weights = np.exp((logits[:size] - logits[:size].max()) * np.float32(1 / sampling.temperature))
    ranked = sorted(range(size), key=lambda token: (-logits[token], token))
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
    if sampling.min_p > 0:
        ranked = [token for token in ranked if weights[token] >= sampling.min_p]
    if sampling.top_p >= 1 and not sampling.top_k and not sampling.min_p:
        ranked = list(range(size))
    at = uniform(seed, position) * sum(float(weights[token]) for token in ranked)
    mass = 0.0
    for token in ranked:
        mass += float(weights[token])
        if mass > at:
            return token
    raise AssertionError("the sum never passed the number drawn")


def chi_squared(drawn: Counter[int], expected: dict[int, float]) -> float:
    """Pearson's statistic; ids that are expected less than ten times are counted as one."""
    rare = {token for token, count in expected.items() if count < 10}
    common = sum((drawn[token] - expected[token]) ** 2 / expected[token] for token in expected.keys() - rare)
    rest = sum(expected[token] for token in rare)
    return common + ((sum(drawn[token] for token in rare) - rest) ** 2 / rest if rest else 0.0)


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
    "sampling",
    [
        Sampling(1.0, 0.9),
        Sampling(0.6, 1.0, 30),
        Sampling(1.5, 0.8, 500),
        Sampling(0.9),
        Sampling(1.0, min_p=0.03),
        Sampling(0.7, 0.95, min_p=0.2),
        Sampling(1.3, 0.9, 60, 0.01),
    ],
)
def test_shortcuts_choose_what_a_full_sort_chooses(sampling: Sampling) -> None:
    generator = np.random.default_rng(5)
    for position in range(25):
        logits = (generator.standard_normal(1900) * generator.choice([0.1, 1.0, 4.0])).astype(np.float32)
        logits[:50] = logits[50]  # ties
        assert sample(logits, sampling, 1880, 3, position) == plain_choice(logits, sampling, 1880, 3, position)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7), Sampling(1.0, 0.9), Sampling(1.4, 1.0, 300)])
def test_ids_of_many_blocks_are_drawn_as_often_as_the_softmax_says(sampling: Sampling) -> None:
    draws, logits = 20_000, (np.random.default_rng(8).standard_normal(3000) * 3).astype(np.float32)
    exact = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    order = np.argsort(-exact, kind="stable")[: sampling.top_k or len(exact)]
    sums = np.cumsum(exact[order])
    order = order[: int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1]
    expected = {int(token): draws * float(exact[token] / exact[order].sum()) for token in order}
    drawn = Counter(sample(logits, sampling, len(logits), 4, position) for position in range(draws))
    assert drawn.keys() <= expected.keys()
    freedom = sum(count >= 10 for count in expected.values())
    assert chi_squared(drawn, expected) < freedom + 4 * math.sqrt(2 * freedom), "four standard deviations"


def test_min_p_keeps_what_is_at_least_that_share_of_the_best() -> None:
    logits = row(*np.log([0.5, 0.3, 0.15, 0.05]))
    assert set(shares(logits, Sampling(1.0, min_p=0.29), 300)) == {0, 1, 2}
    assert set(shares(logits, Sampling(1.0, min_p=0.31), 300)) == {0, 1}
    assert set(shares(row(2, 3, 3), Sampling(1.0, min_p=1.0), 100)) == {1, 2}


def test_min_p_sees_the_probabilities_after_temperature() -> None:
    logits = row(*np.log([0.5, 0.3, 0.2]))
    assert set(shares(logits, Sampling(0.5, min_p=0.5), 300)) == {0}, "0.3 of 0.5 is 60 %, its square 36 %"


def test_top_p_counts_the_mass_that_min_p_will_cut() -> None:
    logits = row(*np.log([0.4, 0.3, 0.1, 0.1, 0.1]))
    assert set(shares(logits, Sampling(1.0, 0.6, min_p=0.5), 300)) == {0, 1}, "of the first two alone 0.4 is only 57 %"
    assert set(shares(logits, Sampling(1.0, 0.39, min_p=0.5), 300)) == {0}
    assert set(shares(logits, Sampling(1.0, 0.99, min_p=0.5), 300)) == {0, 1}


def test_greedy_obeys_bias_penalties_and_mask() -> None:
    logits = row(5, 4, 3, 0)
    history = History([0])
    assert sample(logits, Sampling(0.0, logit_bias=[(3, 5.5), (9, 100.0)]), 4, 1, 0) == 3
    assert sample(logits, Sampling(0.0, repetition_penalty=1.5), 4, 1, 0, history) == 1
    history.push(1)
    assert sample(logits, Sampling(0.0, repetition_penalty=2.0), 4, 1, 0, history) == 2
    assert sample(logits, Sampling(0.0, presence_penalty=2.0), 4, 1, 0, history) == 0, "the prompt is no output"
    assert sample(logits, Sampling(0.0, logit_bias=[(0, 100.0)]), 4, 1, 0, None, np.array([0, 0, 1, 1], np.bool_)) == 2


def test_bias_comes_before_the_repetition_penalty() -> None:
    logits, sampling = row(-1, 3.9), Sampling(0.0, repetition_penalty=2.0, logit_bias=[(0, 5.0)])
    assert sample(logits, sampling, 2, 1, 0, History([0])) == 1, "(5 - 1) / 2, not -1 * 2 + 5 or 5 - 1"


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-42, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 1e-9, 0.5, 0.95]),
    top_k=st.sampled_from([0, 1, 7, 600, 10**9]),
    min_p=st.sampled_from([0.0, 1e-9, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 2.0, -2.0]),
    presence_penalty=st.sampled_from([0.0, 2.0, -2.0]),
    logit_bias=st.lists(st.tuples(st.integers(0, 1500), st.sampled_from([-100.0, 100.0])), max_size=5),
)


@given(sampling=samplings, seed=st.integers(0, 2**32), size=st.integers(1, 1200), data=st.data())
def test_only_possible_and_allowed_ids_are_ever_chosen(
    sampling: Sampling, seed: int, size: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    width = data.draw(st.sampled_from([0.0, 1.0, 40.0, 1e38]))
    logits = (generator.uniform(-1, 1, size + 9) * width).astype(np.float32)
    logits[generator.random(size + 9) < 0.3] = -math.inf
    logits[size:] = 3e38  # padding
    allowed = generator.random(size) < data.draw(st.sampled_from([0.01, 0.5, 1.0]))
    survivor = data.draw(st.integers(0, size - 1))
    logits[survivor], allowed[survivor] = 1.0, True
    history = History(generator.integers(0, size + 9, 50).tolist())
    kept = logits.copy()
    for mask in (allowed, None):
        token = sample(logits, sampling, size, seed, 3, history, mask)
        assert 0 <= token < size
        assert math.isfinite(logits[token])
        assert mask is None or mask[token]
        assert token == sample(logits, sampling, size, seed, 3, history, mask)
    assert np.array_equal(logits, kept)


def test_a_mask_of_everything_changes_nothing() -> None:
    logits = np.random.default_rng(6).standard_normal(1500).astype(np.float32)
    for sampling in (Sampling(0.0), Sampling(1.0), Sampling(0.7, 0.9), Sampling(1.0, 1.0, 20)):
        for position in range(20):
            masked = sample(logits, sampling, 1500, 2, position, None, np.ones(1500, np.bool_))
            assert masked == sample(logits, sampling, 1500, 2, position)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("allowed", [[False, False, False], [True, False, False]])
def test_a_mask_that_leaves_nothing_possible_is_refused(temperature: float, allowed: list[bool]) -> None:
    with pytest.raises(ServiceError, match="leaves no token"):
        sample(row(-math.inf, 1, 2), Sampling(temperature), 3, 1, 0, None, np.array(allowed))


def test_a_row_with_nothing_possible_is_refused() -> None:
    for sampling in (Sampling(0.0), Sampling(1.0), Sampling(1.0, 0.5)):
        with pytest.raises(ServiceError, match="no probabilities"):
            sample(row(-math.inf, -math.inf), sampling, 2, 1, 0)


def test_a_row_of_impossible_ids_but_one_gives_that_one() -> None:
    logits = row(-math.inf, 3, -math.inf)
    for sampling in (Sampling(0.0), Sampling(1.0), Sampling(1.0, 0.5), Sampling(1.0, 1.0, 3)):
        assert {sample(logits, sampling, 3, 9, position) for position in range(20)} == {1}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_no_logits_are_refused(broken: float) -> None:
    with pytest.raises(ServiceError, match="no probabilities"):
        sample(row(0, broken, 1), Sampling(1.0), 3, 1, 0)
    with pytest.raises(ServiceError, match="no probabilities"):
        sample(row(0, broken, 1), Sampling(1.0), 3, 1, 0, None, np.array([True, False, True]))


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = row(0, 1, 2)
    sample(logits, Sampling(0.5, 0.9, 2), 3, 1, 0)
    assert logits.tolist() == [0, 1, 2]
