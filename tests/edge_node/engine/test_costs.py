from __future__ import annotations

import pytest

from edge_node.engine.costs import StepCosts
from edge_node.engine.ladder import LADDER, longest_within
from edge_node.engine.step import Chunk, Decode, StepPlan, StepResult


def chunk_of(tokens: int, seconds: float) -> tuple[StepPlan, StepResult]:
    return StepPlan(1, Chunk(0, 0, [1] * tokens, []), None, 0.0), StepResult(None, None, chunk_s=seconds)


def decode_of(rows: int, seconds: float) -> tuple[StepPlan, StepResult]:
    return StepPlan(1, None, Decode(0, [1] * rows, [1] * rows, []), 0.0), StepResult(None, None, decode_s=seconds)


def test_an_unknown_cost_is_guessed_high() -> None:
    costs = StepCosts()
    assert costs.chunk_s(100) > 1 and costs.decode_s(1) > 0.01
    assert costs.rates().prefill_tokens_s == 0


def test_costs_between_two_known_ones_are_interpolated_and_beyond_them_never_too_low() -> None:
    costs = StepCosts()
    costs.observe(*chunk_of(32, 0.1))
    costs.observe(*chunk_of(128, 0.3))
    assert costs.chunk_s(80) == pytest.approx(0.2)
    assert costs.chunk_s(2) == 0.1
    assert costs.chunk_s(256) == pytest.approx(0.6)


def test_costs_follow_what_is_measured() -> None:
    costs = StepCosts()
    costs.observe(*decode_of(1, 0.01))
    for _ in range(50):
        costs.observe(*decode_of(1, 0.03))
    assert costs.decode_s(1) == pytest.approx(0.03, rel=0.01)


def test_rates_are_those_of_a_long_prompt_and_of_one_stream() -> None:
    costs = StepCosts()
    costs.observe(*chunk_of(2, 0.01))
    costs.observe(*chunk_of(128, 0.16))
    costs.observe(*decode_of(1, 0.01))
    costs.observe(*decode_of(8, 0.02))
    rates = costs.rates()
    assert rates.prefill_tokens_s == pytest.approx(800) and rates.decode_tokens_s == pytest.approx(50)


def test_a_length_that_was_slow_once_is_tried_again() -> None:
    def true_s(tokens: int) -> float:
        return 0.005 + 0.0018 * tokens

    def longest() -> int:
        return longest_within({step: costs.chunk_s(step) for step in LADDER}, 0.05, 256)

    costs = StepCosts()
    for tokens in (2, 32, 128):
        costs.observe(*chunk_of(tokens, true_s(tokens)))
    usual = longest()
    for _ in range(20):
        costs.observe(*chunk_of(usual, 6 * true_s(usual)))
    assert longest() < usual
    for _ in range(100):
        costs.observe(*chunk_of(longest(), true_s(longest())))
    assert longest() >= usual // 2, "what shorter ones cost says that it cannot be that slow"


def test_the_cost_of_depth_is_learnt_so_that_a_stall_is_bounded_far_into_a_prompt() -> None:
    def true_s(tokens: int, start: int) -> float:
        return 0.005 + 0.0018 * tokens * (1 + start / 4000)

    costs, start, over = StepCosts(), 0, 0
    for tokens in (2, 32, 128):
        costs.observe(*chunk_of(tokens, true_s(tokens, 0)))
    lengths: list[int] = []
    while start < 12_000:
        tokens = longest_within({step: costs.chunk_s(step, start) for step in LADDER}, 0.05, 256)
        spent_s = true_s(tokens, start)
        over += spent_s > 0.06
        costs.observe(
            StepPlan(1, Chunk(0, start, [1] * tokens, []), None, 0.0), StepResult(None, None, chunk_s=spent_s)
        )
        lengths.append(tokens)
        start += tokens
    assert over <= 2, "the bound holds as the prompt gets long"
    assert lengths[-1] >= 4
    again = longest_within({step: costs.chunk_s(step, 0) for step in LADDER}, 0.05, 256)
    assert again >= 16, "and the next prompt begins with long chunks again"


def test_a_prediction_knows_how_deep_a_chunk_is() -> None:
    costs = StepCosts()
    costs.observe(*chunk_of(32, 0.05))
    for _ in range(50):
        costs.observe(StepPlan(1, Chunk(0, 4000, [1] * 32, []), None, 0.0), StepResult(None, None, chunk_s=0.1))
    deep = StepPlan(1, Chunk(0, 4000, [1] * 32, []), None, 0.0)
    shallow = StepPlan(1, Chunk(0, 0, [1] * 32, []), None, 0.0)
    assert costs.predict_s(deep) > 1.2 * costs.predict_s(shallow)


def test_the_less_sure_a_prediction_is_the_less_is_planned_for() -> None:
    steady, unsteady = StepCosts(), StepCosts()
    for number in range(50):
        steady.observe(*chunk_of(32, 0.05))
        unsteady.observe(*chunk_of(32, 0.05 if number % 2 else 0.07))
    assert steady.sure_s(0.1) == pytest.approx(0.1)
    assert 0.05 <= unsteady.sure_s(0.1) < 0.085
