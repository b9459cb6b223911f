from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.backoff import Backoff


def ceilings(lives_s: list[float]) -> list[float]:
    """The longest delay that each end of a connection may bring."""
    backoff = Backoff(lambda: 1.0, first_s=0.1, most_s=5.0, min_life_s=5.0)
    return [backoff.next_delay_s(lived_s) for lived_s in lives_s]


def test_the_ceiling_doubles_up_to_the_most() -> None:
    assert ceilings([0.0] * 8) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_a_connection_that_lived_long_enough_starts_over() -> None:
    assert ceilings([0.0, 0.0, 0.0, 5.0, 0.0]) == pytest.approx([0.1, 0.2, 0.4, 0.1, 0.2])


def test_a_connection_that_was_cut_young_counts_as_a_failure() -> None:
    assert ceilings([4.9, 4.9, 4.9]) == pytest.approx([0.1, 0.2, 0.4])


@settings(deadline=None)
@given(draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_a_delay_is_the_drawn_share_of_the_ceiling(draws: list[float]) -> None:
    backoff = Backoff(iter(draws).__next__)
    delays_s = [backoff.next_delay_s() for _ in draws]
    assert delays_s == pytest.approx([draw * most_s for draw, most_s in zip(draws, ceilings([0.0] * 20), strict=False)])
