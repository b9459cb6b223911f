"""The time by which responses are forgotten."""

from __future__ import annotations

from router.store.opening import BELIEVED_S, DAY_S, calendar


class Clocks:
    def __init__(self) -> None:
        self.wall_s = 1_700_000_000.0
        self.elapsed_s = 50.0

    def wait(self, seconds: float) -> None:
        self.wall_s += seconds
        self.elapsed_s += seconds


def test_a_clock_that_jumps_ahead_ages_nothing() -> None:
    clocks = Clocks()
    now = calendar(lambda: clocks.wall_s, lambda: clocks.elapsed_s)
    clocks.wait(40 * DAY_S)
    assert now() == clocks.wall_s
    right_s = clocks.wall_s
    clocks.wall_s += 365 * DAY_S
    assert now() == right_s + BELIEVED_S


def test_a_clock_that_is_set_right_by_a_little_or_back_is_believed() -> None:
    clocks = Clocks()
    now = calendar(lambda: clocks.wall_s, lambda: clocks.elapsed_s)
    for seconds in (BELIEVED_S / 2, -BELIEVED_S, -40 * DAY_S):
        clocks.wall_s += seconds
        assert now() == clocks.wall_s
