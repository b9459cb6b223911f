from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.frames import Sampling
from edge_node.engine.sampling import sample
from edge_node.engine.speculation import GRAMS, Speculator

LENGTHS = (2, 4, 8, 16)
TEXT = st.lists(st.integers(0, 3), max_size=60)
"""Few different ids, so that there is much to find."""


def flat(length: int) -> float:
    """A chunk of any length costs what one id costs: whoever expects anything right should draft."""
    return 1.0


def proportional(length: int) -> float:
    """Nothing is gained by computing ids together."""
    return float(length)


def half_price(length: int) -> float:
    return 1.0 + length / 8


def head_by_brute_force(ids: Sequence[int]) -> int | None:
    """Behind the latest earlier place of the last three ids, else of the last two."""
    for n in GRAMS:
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[len(ids) - n :]:
                return end
    return None


@given(TEXT)
def test_a_prompt_is_looked_up_as_a_brute_force_search_would(prompt: list[int]) -> None:
    head = head_by_brute_force(prompt)
    assert Speculator(prompt).guess(1) == ([] if head is None else [prompt[head]])


@given(TEXT, TEXT)
def test_after_every_id_that_came_unexpected_the_place_is_what_a_brute_force_search_finds(
    prompt: list[int], output: list[int]
) -> None:
    speculator, ids = Speculator(prompt), list(prompt)
    for token in output:
        expected = speculator.guess(1)
        speculator.push(token)
        speculator.check_invariants()
        ids.append(token)
        if expected != [token]:
            head = head_by_brute_force(ids)
            assert speculator.guess(1) == ([] if head is None else [ids[head]])


@given(TEXT, TEXT, st.integers(1, 20))
def test_a_guess_follows_an_earlier_place_of_the_last_two_ids(prompt: list[int], output: list[int], count: int) -> None:
    speculator, ids = Speculator(prompt), list(prompt)
    for token in output:
        speculator.push(token)
        ids.append(token)
    guess = speculator.guess(count)
    assert len(guess) in (0, count)
    copied = ids + guess
    places = [at for at in range(2, len(ids)) if ids[at - 2 : at] == ids[-2:]]
    assert not guess or any(copied[at : at + count] == guess for at in places)


@given(TEXT, TEXT, st.sets(st.sampled_from(LENGTHS)), st.sampled_from([flat, half_price, proportional]))
def test_a_draft_is_the_guess_and_fits_a_length_that_was_asked_for(
    prompt: list[int], output: list[int], lengths: set[int], verify_s: Callable[[int], float]
) -> None:
    speculator = Speculator(prompt)
    for token in output:
        speculator.push(token)
        draft = speculator.draft(sorted(lengths), 1.0, verify_s)
        assert not draft or len(draft) + 1 in lengths
        assert draft == speculator.guess(len(draft))


@given(TEXT, TEXT, st.data())
def test_drafting_changes_nothing(prompt: list[int], output: list[int], data: st.DataObject) -> None:
    asked, left_alone = Speculator(prompt), Speculator(prompt)
    for token in output:
        for _ in range(data.draw(st.integers(0, 2))):
            asked.draft(LENGTHS, 1.0, half_price)
        asked.push(token)
        left_alone.push(token)
    assert asked.draft(LENGTHS, 1.0, half_price) == left_alone.draft(LENGTHS, 1.0, half_price)


def test_nothing_is_drafted_before_copying_was_seen_and_then_all_of_it() -> None:
    text = list(range(100, 200))
    speculator = Speculator(text + text[:3])
    drafts = []
    for token in text[3:60]:
        drafts.append(speculator.draft(LENGTHS, 1.0, half_price))
        speculator.push(token)
    first = next(at for at, draft in enumerate(drafts) if draft)
    assert first == 6, "as soon as a head was right for as long as is told apart"
    assert drafts[first:] == [text[at + 3 : at + 3 + 15] for at in range(first, len(drafts))]


def test_what_was_learnt_on_one_copy_serves_the_next_one_from_its_first_match() -> None:
    text = list(range(100, 200))
    speculator = Speculator(text)
    for token in [*text[:40], 7, *text[60:63]]:
        speculator.push(token)
    draft = speculator.draft(LENGTHS, 1.0, half_price)
    assert draft and draft == text[63 : 63 + len(draft)]


@pytest.mark.parametrize("seed", range(20))
def test_random_text_is_not_drafted_for(seed: int) -> None:
    """In 2,000 ids out of 40 each pair of ids has been there before: there is always a guess."""
    ids = random.Random(seed)
    speculator = Speculator([ids.randrange(40) for _ in range(2000)])
    guesses = drafts = 0
    for _ in range(500):
        speculator.push(ids.randrange(40))
        guesses += bool(speculator.guess(1))
        drafts += bool(speculator.draft(LENGTHS, 1.0, half_price))
    assert guesses > 200
    assert drafts <= 2
    assert speculator.draft(LENGTHS, 1.0, half_price) == []


def test_drafting_stops_when_the_copies_go_wrong() -> None:
    text = list(range(100, 160))
    speculator = Speculator(text)
    for token in text:
        speculator.push(token)
    wrong = 0
    for new in range(1000, 1020):
        for token in (*text[10:13], new):
            if token == new:
                wrong += bool(speculator.draft(LENGTHS, 1.0, half_price))
            speculator.push(token)
    assert 0 < wrong < 8


def test_a_length_is_chosen_by_what_it_costs() -> None:
    text = list(range(100, 160))
    speculator = Speculator(text)
    for token in text[:40]:
        speculator.push(token)
    assert len(speculator.draft(LENGTHS, 1.0, flat)) == 15
    assert speculator.draft(LENGTHS, 1.0, proportional) == []
    assert speculator.draft([], 1.0, flat) == []
    cliff = {2: 1.2, 4: 1.4, 8: 1.8, 16: 9.0}
    assert len(speculator.draft(LENGTHS, 1.0, cliff.__getitem__)) == 7


def test_a_chunk_that_seems_cheaper_than_one_id_is_no_reason_to_draft() -> None:
    speculator = Speculator([1, 2, 3, 4, 1, 2, 3])
    assert speculator.guess(1) == [4]
    assert speculator.draft(LENGTHS, 1.0, lambda length: 0.1) == []


def test_a_loop_is_guessed_beyond_the_end_of_what_is_there() -> None:
    assert Speculator([9, 1, 2, 3, 1, 2, 3]).guess(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert Speculator([5, 5, 5]).guess(3) == [5, 5, 5]


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [1, 2, 3]])
def test_text_too_short_to_repeat_itself_has_no_guess(ids: list[int]) -> None:
    assert Speculator(ids).guess(4) == []


# -- verification (docs/decisions/025-speculation.md) -----------------------------------------------

VOCABULARY = 6
SAMPLING = Sampling(0.9, 0.95)
ROWS = np.random.default_rng(25).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) * 1.5
"""A model: logits of the next id after each id."""


def plain(first: int, seed: int, count: int) -> list[int]:
    """Sample one id after another."""
    ids = [first]
    for position in range(count):
        ids.append(sample(ROWS[ids[-1]], SAMPLING, VOCABULARY, seed, position))
    return ids[1:]


def verified(known: int, draft: Sequence[int], seed: int, position: int) -> list[int]:
    """The ids that a verification says: sampled at each position, as long as the draft before it was right."""
    said: list[int] = []
    for at, before in enumerate([known, *draft]):
        said.append(sample(ROWS[before], SAMPLING, VOCABULARY, seed, position + at))
        if at < len(draft) and said[-1] != draft[at]:
            break
    return said


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    kept = expected > 0
    assert counts[~kept].sum() == 0
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum())


def target(before: int) -> NDArray[np.float64]:
    """The plain definition of SAMPLING's distribution after an id."""
    weights: NDArray[np.float64] = np.exp(ROWS[before].astype(np.float64) / SAMPLING.temperature)
    weights /= weights.sum()
    ranked = np.argsort(-weights, kind="stable")
    cut = int(np.searchsorted(np.cumsum(weights[ranked]), SAMPLING.top_p)) + 1
    kept = np.zeros(VOCABULARY)
    kept[ranked[:cut]] = weights[ranked[:cut]]
    kept /= kept.sum()
    return kept


@given(st.integers(0, 2**63 - 1), st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)))
def test_whatever_is_drafted_the_ids_are_those_of_the_undrafted_answer(seed: int, drafts: list[list[int]]) -> None:
    said: list[int] = []
    for draft in drafts:
        said += verified(said[-1] if said else 0, draft, seed, len(said))
    assert said == plain(0, seed, len(said))


@pytest.mark.parametrize("drafted", range(VOCABULARY))
def test_a_drafted_id_is_accepted_as_often_as_it_is_likely_and_refused_for_the_rest_of_the_distribution(
    drafted: int,
) -> None:
    """Rejection sampling with a point mass for a proposal (Leviathan, Kalman and Matias 2023)."""
    draws = 6000
    counts = np.bincount([verified(0, [drafted], seed, 0)[0] for seed in range(draws)], minlength=VOCABULARY)
    likely = target(0)
    # 5 degrees of freedom at most: 20.5 is passed by one sample in a thousand; the seeds are fixed.
    assert chi_square(counts, likely * draws) < 20.5
    rest = likely.copy()
    rest[drafted] = 0
    refused = counts.copy()
    refused[drafted] = 0
    assert chi_square(refused, rest / rest.sum() * refused.sum()) < 20.5


def test_pairs_of_ids_are_distributed_the_same_with_drafts_that_are_often_wrong() -> None:
    draws, pairs = 12000, np.zeros((VOCABULARY, VOCABULARY), np.int64)
    drafts = itertools.cycle(itertools.product(range(VOCABULARY), repeat=2))
    for seed, draft in zip(range(draws), drafts, strict=False):
        said = verified(0, draft, seed, 0)
        if len(said) == 1:
            said += verified(said[0], [draft[0]], seed, 1)
        pairs[said[0], said[1]] += 1
    likely = np.array([target(0)[first] * target(first) for first in range(VOCABULARY)])
    # 35 degrees of freedom at most: 66.6 is passed by one sample in a thousand.
    assert chi_square(pairs, likely * draws) < 66.6
