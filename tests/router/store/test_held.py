"""What a router remembers of its own responses is bounded, and forgets what has ended."""

from __future__ import annotations

import pytest

from router.journal import Dropped
from router.store import held as held_module
from router.store.held import Held
from tests.router.store.entries import began, ended, said


def test_what_ended_or_was_dropped_is_forgotten() -> None:
    held = Held()
    for entry in (began(), began("resp_r_2")):
        held.settle(entry, "kept")
    held.settle(began("resp_r_3"), "refused")
    assert len(held) == 2
    held.settle(ended(), "refused")
    assert held.epoch("resp_r_1") == 0
    held.settle(ended(), "kept")
    held.settle(Dropped("resp_r_2"), "kept")
    assert len(held) == 0


def test_what_was_lost_is_remembered_as_taken_until_it_is_claimed_again() -> None:
    held = Held()
    held.take("resp_r_1", 5)
    held.settle(said(0, 1), "lost")
    assert (held.epoch("resp_r_1"), held.was_taken("resp_r_1")) == (None, True)
    held.take("resp_r_1", 7)
    assert held.epoch("resp_r_1") == 7
    assert not held.was_taken("resp_r_2")


def test_of_two_claims_whose_answers_cross_the_later_counts() -> None:
    held = Held()
    held.take("resp_r_1", 2_000_000)
    held.take("resp_r_1", 1_000_000)
    assert held.epoch("resp_r_1") == 2_000_000
    held.settle(began(), "kept")
    assert held.epoch("resp_r_1") == 0, "it began anew"


def test_however_much_is_lost_or_never_ends_the_memory_of_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "MAX_HELD", 10)
    monkeypatch.setattr(held_module, "MAX_LOST", 5)
    held = Held()
    for number in range(100):
        held.take(f"resp_{number}", number)
    assert len(held) == 15
    assert [held.epoch(f"resp_{number}") for number in (89, 90, 99)] == [None, 90, 99]
    assert [held.was_taken(f"resp_{number}") for number in (84, 85, 99)] == [False, True, True]
