"""Liveness and restarts in simulated time: `now_s` is whatever a test says."""

from __future__ import annotations

import random

import pytest

from core.frames import Rates
from edge_node.runtime.pipe import Beat
from edge_node.supervision import LIVED_S, MAX_BACKOFF_S, Patience, Supervisor

PATIENCE = Patience(load_s=60.0, hang_s=30.0)


def idle(step: int = 0) -> Beat:
    return Beat(step, -1.0, 0.0, 0, 0, Rates())


def busy(age_s: float, predicted_s: float, step: int = 1) -> Beat:
    return Beat(step, age_s, predicted_s, 1, 0, Rates())


def ready_at(now_s: float) -> Supervisor:
    supervisor = Supervisor(PATIENCE, now_s)
    supervisor.started(now_s)
    supervisor.loaded(now_s)
    return supervisor


def test_an_idle_engine_is_vouched_for_while_it_beats() -> None:
    supervisor = ready_at(0.0)
    for tenth in range(600):
        supervisor.beat(idle(), tenth / 10)
        assert supervisor.vouched(tenth / 10 + 0.1)


def test_an_idle_engine_that_is_silent_for_over_a_second_is_not_vouched_for() -> None:
    supervisor = ready_at(0.0)
    supervisor.beat(idle(), 5.0)
    assert supervisor.vouched(6.0)
    assert not supervisor.vouched(6.1)


def test_a_long_step_is_not_taken_for_a_hang() -> None:
    supervisor = ready_at(0.0)
    for tenth in range(310):
        age_s = tenth / 10
        supervisor.beat(busy(age_s, predicted_s=10.0), age_s)
        assert supervisor.vouched(age_s)


def test_a_hang_is_not_taken_for_a_long_step() -> None:
    supervisor = ready_at(0.0)
    supervisor.beat(busy(1.29, predicted_s=0.1), 10.0)
    assert supervisor.vouched(10.0)
    supervisor.beat(busy(1.31, predicted_s=0.1), 10.02)
    assert not supervisor.vouched(10.02)


def test_a_step_ages_while_no_beats_come() -> None:
    supervisor = ready_at(0.0)
    supervisor.beat(busy(0.1, predicted_s=1.0), 10.0)
    assert supervisor.vouched(13.9)
    assert not supervisor.vouched(14.0)


def test_an_engine_that_loads_or_is_gone_is_not_vouched_for() -> None:
    supervisor = Supervisor(PATIENCE, 0.0)
    assert (supervisor.state, supervisor.vouched(0.0)) == ("loading", False)
    supervisor.started(0.0)
    assert (supervisor.state, supervisor.vouched(0.0)) == ("loading", False)
    supervisor.loaded(1.0)
    assert (supervisor.state, supervisor.vouched(1.0)) == ("ready", True)
    supervisor.ended(2.0)
    assert (supervisor.state, supervisor.vouched(2.0)) == ("failed", False)


def test_a_hanging_engine_is_killed_after_its_patience_only() -> None:
    supervisor = ready_at(0.0)
    supervisor.beat(idle(), 0.0)
    assert supervisor.why_kill(1.0) is None
    assert supervisor.why_kill(30.9) is None
    assert supervisor.why_kill(31.1) == "it did not move for 30 s"


def test_an_engine_that_moves_again_is_forgiven() -> None:
    supervisor = ready_at(0.0)
    assert supervisor.why_kill(25.0) is None
    supervisor.beat(idle(), 25.0)
    assert supervisor.why_kill(25.5) is None
    assert supervisor.why_kill(50.0) is None
    assert supervisor.why_kill(55.6) is not None


def test_an_engine_that_does_not_load_in_time_is_killed() -> None:
    supervisor = Supervisor(PATIENCE, 0.0)
    supervisor.started(10.0)
    assert supervisor.why_kill(70.0) is None
    assert supervisor.why_kill(70.1) == "it did not load within 60 s"


def test_restarts_back_off_from_half_a_second_to_eight() -> None:
    supervisor, now_s, pauses = Supervisor(PATIENCE, 0.0), 0.0, []
    for _ in range(7):
        supervisor.started(now_s)
        supervisor.ended(now_s)
        pauses.append(supervisor.retry_at_s - now_s)
        now_s = supervisor.retry_at_s
    assert pauses == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0])
    assert supervisor.restarts == 7


def test_the_backoff_starts_anew_after_a_life_that_lasted() -> None:
    supervisor = Supervisor(PATIENCE, 0.0)
    for _ in range(5):
        supervisor.started(0.0)
        supervisor.ended(0.0)
    supervisor.started(100.0)
    supervisor.loaded(101.0)
    supervisor.ended(101.0 + LIVED_S)
    assert supervisor.retry_at_s == pytest.approx(101.0 + LIVED_S + 0.5)


def test_the_rules_hold_over_random_lives() -> None:
    for seed in range(500):
        chance = random.Random(seed)
        supervisor, now_s = Supervisor(PATIENCE, 0.0), 0.0
        for _ in range(60):
            now_s += chance.expovariate(1.0)
            match chance.randrange(4) if supervisor.phase == "ready" else chance.randrange(2):
                case 0 if supervisor.phase == "waiting":
                    supervisor.started(now_s)
                case 0 if supervisor.phase == "loading":
                    supervisor.loaded(now_s)
                case 1 if supervisor.phase != "waiting":
                    supervisor.ended(now_s)
                    assert now_s + 0.5 <= supervisor.retry_at_s <= now_s + MAX_BACKOFF_S
                case 2:
                    supervisor.beat(idle(), now_s)
                    assert supervisor.vouched(now_s)
                case 3:
                    supervisor.beat(busy(chance.random() * 5, chance.random()), now_s)
                case _:
                    pass
            assert supervisor.phase == "ready" or not supervisor.vouched(now_s)
            assert not (supervisor.vouched(now_s) and supervisor.why_kill(now_s))
