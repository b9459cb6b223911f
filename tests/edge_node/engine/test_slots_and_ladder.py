from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.engine.ladder import LADDER, longest_within, next_stretch
from edge_node.engine.slots import Slots


def test_the_lowest_free_slot_goes_first() -> None:
    slots = Slots(3)
    assert [slots.allocate() for _ in range(4)] == [0, 1, 2, None]
    slots.release(2)
    slots.release(0)
    assert slots.allocate() == 0
    slots.check_invariants()


def test_a_slot_is_not_released_twice() -> None:
    slots = Slots(2)
    slots.allocate()
    slots.release(0)
    with pytest.raises(KeyError):
        slots.release(0)
    slots.check_invariants()


@given(st.data())
def test_free_and_used_always_make_the_capacity(data: st.DataObject) -> None:
    slots = Slots(5)
    held: set[int] = set()
    for _ in range(30):
        give_back: bool = data.draw(st.booleans())
        if held and give_back:
            slot = data.draw(st.sampled_from(sorted(held)))
            slots.release(slot)
            held.remove(slot)
        elif (taken := slots.allocate()) is not None:
            assert taken not in held
            held.add(taken)
        assert slots.used == len(held)
        slots.check_invariants()


@given(capacity=st.integers(2, 700), share=st.floats(0, 1), most=st.integers(1, 600))
def test_stretches_cover_every_prompt_within_its_slot_in_steps_of_the_ladder(
    capacity: int, share: float, most: int
) -> None:
    prompt_tokens = max(1, int((capacity - 1) * share))
    computed, stretches = 0, 0
    while computed < prompt_tokens:
        stretch = next_stretch(computed, prompt_tokens, capacity, most)
        end = stretch.start + stretch.length
        assert stretch.length in LADDER and stretch.length <= max(most, LADDER[0])
        assert 0 <= stretch.start <= computed < end <= capacity
        computed, stretches = min(end, prompt_tokens), stretches + 1
    assert stretches <= 2 + prompt_tokens // 2


def test_a_lone_last_token_is_read_again_with_its_predecessor() -> None:
    stretch = next_stretch(computed=16, prompt_tokens=17, capacity=64, most=16)
    assert (stretch.start, stretch.length) == (15, 2)


def test_a_prompt_of_one_token_is_padded() -> None:
    stretch = next_stretch(computed=0, prompt_tokens=1, capacity=64, most=16)
    assert (stretch.start, stretch.length) == (0, 2)


def test_one_step_of_the_ladder_is_granted_whatever_it_costs() -> None:
    costs = {step: float(step) for step in LADDER}
    assert longest_within(costs, 0.5, 512) == 2
    assert longest_within(costs, 100.0, 512) == 96
    assert longest_within(costs, 1e9, 64) == 64
